"""Time of the product over a mixture's experts beside PyTorch's grouped product in bf16, on one GPU.

    python bench/experts.py OUT [--codecs trellis-4 …] [--tokens 1 8 …] [--experts 64 128] [--top-k 8]

Qwen3-30B-A3B's shapes: gate and up read a row of x a token, down reads one a pair. Results are checked first. A time is
the median over replays of a CUDA graph of calls with routings of their own, which go through so many experts that each
is read from memory; rotation of x, and finding out which pairs an expert has, included. The grouped product gets the
same routings, but its rows sorted and its offsets made beforehand. The floor is bytes stored of the experts in use ÷
what the card reads in the same run. OUT gets experts.json and experts.md.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernels import heading, read_rate, time_graph
from torch import Tensor

from glq.codecs import CODECS
from glq.ops.experts import experts_matmul
from glq.packed import PackedExperts, packed_shapes, unpack_signs
from glq.rotation import block_width, rotate

SHAPES = [(1536, 2048, True), (2048, 768, False)]  # out, in, whether x has a row a token
TOKENS = [1, 2, 4, 8, 16, 64, 512, 2048]
_STORED = 500e6  # bytes of all copies of the codes
_READ = 300e6  # bytes of the calls in a graph
_MOST_CALLS = 32
_CHECKED = 24  # pairs


@dataclass(frozen=True)
class Row:
    """µs a product. error: in units of what the same-dtype PyTorch product has, against fp64."""

    codec: str
    experts: int
    tokens: int
    out_features: int
    in_features: int
    in_use: float  # experts that have pairs
    us: float
    floor_us: float
    bf16_us: float
    error: float


@dataclass(frozen=True)
class Shape:
    """of_tokens: x has a row for each token, else for each pair."""

    experts: int
    top_k: int
    out_features: int
    in_features: int
    of_tokens: bool

    def rows(self, tokens: int) -> int:
        """Of x."""
        return tokens if self.of_tokens else tokens * self.top_k

    @property
    def pairs_a_row(self) -> int:
        return self.top_k if self.of_tokens else 1


def routings(shape: Shape, tokens: int, calls: int) -> list[Tensor]:
    """Of each call the experts of its pairs [tokens · top_k]; single tokens take turns with the experts."""
    drawn = torch.rand(tokens * calls, shape.experts, device="cuda").argsort(1)[:, : shape.top_k]
    if tokens == 1 and shape.experts % shape.top_k == 0:
        turns = torch.cat([torch.randperm(shape.experts, device="cuda") for _ in range(calls)])
        drawn = turns.view(-1, shape.top_k)[:calls]
    return list(drawn.reshape(calls, -1).contiguous())


def in_use(routes: list[Tensor]) -> float:
    return sum(len(route.unique()) for route in routes) / len(routes)


def call_count(shape: Shape, tokens: int, expert_bytes: int) -> int:
    """How many calls read enough."""
    pairs = tokens * shape.top_k
    used = shape.experts * (1 - (1 - 1 / shape.experts) ** pairs)
    return max(2, min(_MOST_CALLS, int(_READ / (used * expert_bytes)) + 1))


def bf16_time(shape: Shape, routes: list[Tensor], matrices: Tensor) -> float:
    calls = []
    for route in routes:
        ends = torch.bincount(route, minlength=shape.experts).cumsum(0).int()
        rows = torch.randn(len(route), shape.in_features, device="cuda").bfloat16()
        calls.append(lambda rows=rows, ends=ends: torch._grouped_mm(rows, matrices.transpose(1, 2), offs=ends))
    return time_graph(calls)


def random_weights(codec: str, shape: Shape) -> list[PackedExperts]:
    """Copies that differ in their codes alone."""
    shapes = packed_shapes(codec, shape.out_features, shape.in_features)
    rows, cols, size = shapes["codes"]
    codes_shape = (shape.experts, rows, cols, size)
    count = int(_STORED / (shape.experts * rows * cols * size)) + 1
    signs = torch.randint(0, 256, shapes["signs"], dtype=torch.uint8, device="cuda")
    scale = (torch.rand(shape.experts, shape.out_features, device="cuda") + 0.5).half()
    copies = [torch.randint(0, 256, codes_shape, dtype=torch.uint8, device="cuda") for _ in range(count)]
    sizes = (codec, shape.out_features, shape.in_features, block_width(shape.in_features))
    return [PackedExperts(*sizes, codes, scale, signs) for codes in copies]


def multiply(x: Tensor, weights: PackedExperts, route: Tensor, pairs_a_row: int) -> Tensor:
    w = weights
    return experts_matmul(x, w.codes, w.scale, w.signs, route, pairs_a_row, w.codec, w.out_features, w.block)


def error(y: Tensor, x: Tensor, weights: PackedExperts, route: Tensor, pairs_a_row: int) -> float:
    """Of some pairs; of all others, that they are numbers."""
    assert torch.isfinite(y).all()
    pairs = torch.randperm(len(route), device="cuda")[:_CHECKED]
    signs, off, plain_off = unpack_signs(weights.signs, weights.in_features), 0.0, 0.0
    for pair in pairs.tolist():
        one = weights[int(route[pair])]
        matrix = one.decode() * one.scale.float()[:, None]
        rotated = rotate(x[pair // pairs_a_row].float(), signs, weights.block)
        exact = one.decode().double() * one.scale.double()[:, None] @ rotated.double()
        plain = matrix.to(x.dtype) @ rotated.to(x.dtype)
        off += (y[pair].double() - exact).square().sum().item()
        plain_off += (plain.double() - exact).square().sum().item()
    return (off / plain_off) ** 0.5


def measure(
    copies: list[PackedExperts],
    shape: Shape,
    tokens: int,
    rate: float,
    matrices: Tensor,
) -> Row:
    expert_bytes = copies[0].codes[0].numel() + 2 * shape.out_features
    routes = routings(shape, tokens, call_count(shape, tokens, expert_bytes))
    x = torch.randn(shape.rows(tokens), shape.in_features, device="cuda").bfloat16()
    codec, each = copies[0].codec, shape.pairs_a_row
    found = error(multiply(x, copies[0], routes[0], each), x, copies[0], routes[0], each)
    assert found < 2, f"{codec}, {shape}, {tokens} tokens: {found} times the error of PyTorch"
    turns = [(copies[i % len(copies)], route) for i, route in enumerate(routes)]
    us = time_graph([lambda weights=w, route=route: multiply(x, weights, route, each) for w, route in turns])
    used = in_use(routes)
    sizes = (shape.experts, tokens, shape.out_features, shape.in_features)
    return Row(codec, *sizes, used, us, used * expert_bytes / rate, bf16_time(shape, routes, matrices), found)


def table(rows: list[Row], rate: float) -> str:
    lines = [
        heading(rate),
        "",
        "| codec | experts | tokens | out × in | in use | µs | ÷ floor | bf16 µs | × bf16 | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.codec} | {r.experts} | {r.tokens} | {r.out_features} × {r.in_features} | {r.in_use:.0f} | {r.us:.1f} "
        f"| {r.us / r.floor_us:.2f} | {r.bf16_us:.1f} | {r.bf16_us / r.us:.2f} | {r.error:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codecs", nargs="*", choices=list(CODECS), default=["trellis-4"])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--experts", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--top-k", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rate = read_rate()
    rows: list[Row] = []
    for shape in [Shape(experts, args.top_k, *sizes) for experts in args.experts for sizes in SHAPES]:
        matrix_shape = (shape.experts, shape.out_features, shape.in_features)
        matrices = torch.randn(matrix_shape, device="cuda", dtype=torch.bfloat16)
        for codec in args.codecs:
            copies = random_weights(codec, shape)
            for tokens in args.tokens:
                rows.append(measure(copies, shape, tokens, rate, matrices))
                print(table(rows[-1:], rate).splitlines()[-1], flush=True)
                (args.out / "experts.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
                (args.out / "experts.md").write_text(table(rows, rate), encoding="utf-8")
    print(table(rows, rate))


if __name__ == "__main__":
    main()
