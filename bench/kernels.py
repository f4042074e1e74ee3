"""Time of a quantized product beside cuBLAS bf16 and beside what reading its bytes takes, on one GPU.

    python bench/kernels.py OUT [--codecs trellis-4 …] [--tokens 1 8 …] [--shapes 4096x4096 …] [--triton]

Every result is checked first. A time is the median over replays of a CUDA graph that goes through as many copies of the
matrix as fill the L2 cache several times, so each is read from memory; rotation of x included. bf16 and the codecs take
turns, with equal rests and equally long: many tokens take all the power that the card may have, so what it did before
decides how fast it is. The floor is bytes stored ÷ what the card reads in the same run. OUT gets kernels.json,
kernels.md and kernels.svg.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glq.codecs import CODECS, DEFAULT_CODECS
from glq.ops.matmul import matmul, matmul_reference
from glq.packed import decode_matrix, packed_shapes, unpack_signs
from glq.rotation import block_width, rotate

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]  # [out, in]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192]
_COPIES = 256e6  # bytes that they take together
_TURN, _REST = 8e3, 0.01  # µs at least that one is timed at a time; s before


@dataclass(frozen=True)
class Row:
    """µs a product. error: in units of what the same-dtype PyTorch product has, against fp64."""

    codec: str
    tokens: int
    out_features: int
    in_features: int
    us: float
    floor_us: float
    bf16_us: float
    error: float


def make_graph(calls: list[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """Of all calls, of which two were made before."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # what the calls read may still be under way
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Median µs of a replay."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) * 1e3 for start, end in events)


def time_graph(calls: list[Callable[[], Tensor]], replays: int = 15) -> float:
    """Median µs of one call."""
    graph = make_graph(calls)
    replay(graph, 2)
    return replay(graph, replays) / len(calls)


def time_in_turns(sets: list[list[Callable[[], Tensor]]], rounds: int = 7) -> list[float]:
    """Median µs of one call of each set, which take turns for equally long, after equal rests."""
    graphs = [make_graph(calls) for calls in sets]
    once = [replay(graph, 3) for graph in graphs]
    turn = max(_TURN, 2 * max(once))
    times = [round(turn / us) for us in once]
    found: list[list[float]] = [[] for _ in sets]
    for _ in range(rounds):
        for graph, count, us in zip(graphs, times, found, strict=True):
            time.sleep(_REST)
            us.append(replay(graph, count))
    return [median(us) / len(calls) for us, calls in zip(found, sets, strict=True)]


def read_rate() -> float:
    """Bytes a µs that a large sum reads."""
    values = torch.empty(1 << 29, device="cuda").normal_()
    return values.numel() * 4 / time_graph([values.sum])


def bf16_calls(tokens: int, out_features: int, in_features: int) -> list[Callable[[], Tensor]]:
    count = max(2, int(_COPIES / (2 * out_features * in_features)) + 1)
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


@dataclass(frozen=True)
class Problem:
    """Random codes of a matrix, several times, and x [tokens, in]."""

    codec: str
    out_features: int
    in_features: int
    block: int
    x: Tensor
    copies: list[Tensor]
    scale: Tensor
    signs: Tensor

    @classmethod
    def make(cls, codec: str, tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> "Problem":
        shape = packed_shapes(codec, out_features, in_features)["codes"]
        size = shape[0] * shape[1] * shape[2]
        copies = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(int(_COPIES / size) + 2)
        ]
        signs = torch.randint(0, 256, (in_features // 8,), dtype=torch.uint8, device="cuda")
        scale = (torch.rand(out_features, device="cuda") + 0.5).half()
        x = torch.randn(tokens, in_features, device="cuda").to(dtype)
        return cls(codec, out_features, in_features, block_width(in_features), x, copies, scale, signs)

    def given(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, str, int, int]:
        """As ops.matmul takes it."""
        return self.x, codes, self.scale, self.signs, self.codec, self.out_features, self.block

    def error(self, y: Tensor, rows: int = 4096) -> float:
        """Of the last rows of y, made from the last copy."""
        part = slice(-min(rows, self.out_features), None)
        height = packed_shapes(self.codec, rows, self.in_features)["codes"][0]
        codes, scale = self.copies[-1][-height:], self.scale[part]
        rotated = rotate(self.x.float(), unpack_signs(self.signs, self.in_features), self.block).double()
        exact = rotated @ decode_matrix(codes, self.codec, len(scale), self.in_features).double().T * scale.double()
        plain = matmul_reference(self.x, codes, scale, self.signs, self.codec, len(scale), self.block)
        return ((y[:, part].double() - exact).norm() / (plain.double() - exact).norm()).item()


def measure(
    codecs: list[str],
    tokens: int,
    shape: tuple[int, int],
    rate: float,
    op: Callable = matmul,
    dtype: torch.dtype = torch.float16,
) -> list[Row]:
    """op: as ops.matmul; dtype: of x."""
    sets, errors, stored = [bf16_calls(tokens, *shape)], [], []
    for codec in codecs:
        problem = Problem.make(codec, tokens, *shape, dtype)
        errors.append(problem.error(op(*problem.given(problem.copies[-1]))))
        assert errors[-1] < 2, f"{codec}, {tokens} tokens, {shape}: {errors[-1]} times the error of PyTorch"
        sets.append([lambda codes=codes, problem=problem: op(*problem.given(codes)) for codes in problem.copies])
        stored.append(problem.copies[0].numel() + 2 * shape[0] + shape[1] // 8)
    bf16, *times = time_in_turns(sets)
    return [
        Row(codec, tokens, *shape, us, size / rate, bf16, error)
        for codec, us, size, error in zip(codecs, times, stored, errors, strict=True)
    ]


def heading(rate: float) -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}; the card reads {rate / 1e6:.2f} TB/s"


def table(rows: list[Row], rate: float) -> str:
    lines = [
        heading(rate),
        "",
        "| codec | tokens | out × in | µs | ÷ floor | bf16 µs | × bf16 | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.codec} | {r.tokens} | {r.out_features} × {r.in_features} | {r.us:.1f} | {r.us / r.floor_us:.2f} "
        f"| {r.bf16_us:.1f} | {r.bf16_us / r.us:.2f} | {r.error:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], file: Path) -> None:
    """How many times as fast as bf16, by tokens; a panel for each shape."""
    shapes = list(dict.fromkeys((r.out_features, r.in_features) for r in rows))
    figure = Figure(figsize=(3.2 * len(shapes), 3.4), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes, strict=True):
        for codec in dict.fromkeys(r.codec for r in rows):
            of_codec = [r for r in rows if r.codec == codec and (r.out_features, r.in_features) == shape]
            axes.plot([r.tokens for r in of_codec], [r.bf16_us / r.us for r in of_codec], marker=".", label=codec)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens", title="{} × {}".format(*shape), ylim=(0, None))
    figure.axes[0].set_ylabel("times as fast as cuBLAS bf16")
    figure.axes[0].legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codecs", nargs="*", choices=list(CODECS), default=[DEFAULT_CODECS[b] for b in (2, 3, 4)])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of x")
    parser.add_argument("--triton", action="store_true", help="Triton's kernels, which other codecs and GPUs take")
    parser.add_argument("--shapes", nargs="*", default=[f"{rows}x{cols}" for rows, cols in SHAPES])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shapes = [(int(rows), int(cols)) for rows, _, cols in (s.partition("x") for s in args.shapes)]
    op, dtype = matmul, getattr(torch, args.dtype)
    if args.triton:
        from glq.ops.triton_matmul import matmul as op
    rate = read_rate()
    rows: list[Row] = []
    for tokens in args.tokens:
        for shape in shapes:
            rows += measure(args.codecs, tokens, shape, rate, op, dtype)
            print(table(rows[-len(args.codecs) :], rate).splitlines()[-len(args.codecs) :], flush=True)
            (args.out / "kernels.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
            (args.out / "kernels.md").write_text(table(rows, rate), encoding="utf-8")
    plot(rows, args.out / "kernels.svg")
    print(table(rows, rate))


if __name__ == "__main__":
    main()
