"""Tokens a second, KV tokens and weights' memory in vLLM: random codes of a Llama's shape beside bf16 and GPTQ's int4.

    python bench/serve.py OUT.json [--weights bf16 int4 trellis-4 trellis-2] [--batch 1 8 32] [--prompt 128] [--new 128]
        [--shape llama-3-8b | llama-3-70b | qwen3-30b-a3b] [--layers 20] [--tp 2] [--own-sums]
    python bench/serve.py OUT.json --weights trellis-4 trellis-4+kv4 --prompt 32768 --batch 1 8 --repeat 1
    python bench/serve.py OUT.json --weights trellis-4 trellis-4+kv4 --prompt 2048 --new 512 --batch 64 --kv-gib 8

trellis-4+head has lm_head in these codes, too; the others leave it in 16 bits. bf16+kv4, trellis-4+head+kv3 and so on
have an E8 KV cache of so many bits; the others keep keys and values in bf16. The third line is what happens where these
have no pages left.
glq has to be installed, not only on the path: vLLM finds the plugin by its entry point. Each kind of weights is served
by a process of its own from a directory that holds a config.json alone (load_format="dummy"), so that all of them have
the machine to themselves in one run. What a quantized layer computes, and how many bytes each rank holds, is checked
before anything is timed. CUDA graphs are captured for the batches that are timed and for steps with short prompts, of
up to --capture tokens (512, where vLLM's default ends), and no others.

An engine takes two minutes to start. --meet FOLDER COUNT has the COUNT engines that meet in the folder, of this run and
others, start at the same time and then be timed one after the other, with --kv-gib of memory for keys and values each.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glq.codecs import CODECS

# served.py is imported by functions alone: vLLM's processes import this file, too, and not from where it is

WITHIN = 0.03  # of what is expected, the bytes that a rank holds
KV = "+kv"
LONGEST = 16384  # tokens a step: what a prompt is cut into, and with it the memory that activations take
PATIENCE = 120  # seconds that an engine waits for others


def weight_bytes(worker: Any) -> int:
    """Of all parameters on a rank, each counted once."""
    model = worker.get_model()
    return sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.parameters()}.values())


def loaded_bytes(worker: Any) -> int:
    """By how much vLLM saw a GPU's memory shrink while it loaded the model."""
    return int(worker.model_runner.model_memory_usage)


def errors(worker: Any) -> dict[str, float]:
    """Of the first packed layers on a rank, for 1 to 600 tokens, relative to the product with the decoded weight.

    Of x as it is and, where a layer is one product, of a normed sum and of silu(gate) · up as compiled graphs have
    them. Nothing if there are none: on a CPU, where weights are decoded once.
    """
    import torch
    from torch.nn.functional import silu

    from glq.ops.fused_matmul import norm_matmul, normed, silu_matmul
    from glq.vllm_integration.parts import codes_of, dequantize

    found: dict[str, float] = {}
    for layer in [m for m in worker.get_model().modules() if hasattr(m, "glq_runs")][:4]:
        packed = layer.weight_packed if hasattr(layer, "weight_packed") else layer.weight
        weight = dequantize(packed, layer.scale, layer.signs, layer.glq_parts, torch.float32)
        for tokens in (1, 8, 32, 600):
            x, other = torch.randn(2, tokens, weight.shape[1], device=weight.device, dtype=torch.bfloat16)
            products = [(x, layer.quant_method.apply(layer, x))]
            for run in layer.glq_runs if len(layer.glq_runs) == 1 else ():
                sizes = (run.codec, run.end_row - run.first_row, run.block)
                given = (codes_of(packed, run), layer.scale, layer.signs[run.signs], *sizes)
                y, total = norm_matmul(x, other, x[0], 1e-5, *given)
                products += [(normed(x + other, x[0], 1e-5), y), (silu(x) * other, silu_matmul(x, other, *given))]
                if not torch.equal(total, x + other):
                    raise SystemExit(f"{layer.glq_name}: with {tokens} tokens the sum that is normed is wrong")
            for made, y in products:
                exact = torch.cat([made.double() @ rows.double().T for rows in weight.split(4096)], 1)
                error = ((y.double() - exact).norm() / exact.norm()).item()
                found[layer.glq_name] = max(found.get(layer.glq_name, 0.0), error)
        del weight
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other engines may be starting on this GPU
    return found


def expert_errors(worker: Any) -> dict[str, float]:
    """The same of the first packed experts on a rank: of all pairs of 1 to 2,500 tokens with eight of them each."""
    import torch

    from glq.ops.experts import experts_matmul, experts_reference
    from glq.vllm_integration.experts import packed

    found: dict[str, float] = {}
    for layer in [m for m in worker.get_model().modules() if hasattr(m, "glq_w13")][:1]:
        for p in (*layer.glq_w13, *layer.glq_w2):
            w = packed(layer, p)
            top_k, sizes = min(8, w.count), (w.codec, w.out_features, w.block)
            for tokens in (1, 8, 32, 600, 2500):
                x = torch.randn(tokens, w.in_features, device=w.codes.device, dtype=torch.bfloat16)
                pairs = torch.rand(tokens, w.count, device=x.device).topk(top_k).indices.flatten()
                exact = experts_reference(x.double(), w, pairs, top_k)
                y = experts_matmul(x, w.codes, w.scale, w.signs, pairs, top_k, *sizes)
                error = ((y.double() - exact).norm() / exact.norm()).item()
                found[f"{p.codes} {tokens}"] = error
    return found


def kv_errors(worker: Any) -> dict[str, Any]:
    """Of a rank's E8 KV cache: of codes to vectors, and of attention to what plain PyTorch has for the same pages."""
    import torch

    from glq.kv.layout import attend_reference
    from glq.kv.pages import attend, gather, has_kernels, write

    attention = next(m.impl for m in worker.get_model().modules() if hasattr(getattr(m, "impl", None), "layout"))
    layout, device = attention.layout(16), worker.device
    keys, values = torch.randn(2, 4 * 80, layout.heads, layout.head_dim, device=device, dtype=torch.bfloat16)
    pages = torch.zeros(21, layout.nbytes, dtype=torch.uint8, device=device)
    table = torch.randperm(20, device=device).view(4, 5).int() + 1
    slots = (table[..., None] * 16 + torch.arange(16, device=device)).flatten().long()
    write(pages, layout, keys, values, slots)
    decoded = gather(pages, layout, table.flatten(), len(keys), keys.dtype)
    q = torch.randn(4, attention.num_heads, layout.head_dim, device=device, dtype=torch.bfloat16)
    lengths = torch.tensor([1, 17, 64, 80], device=device).int()
    given = (q, pages, layout, table, lengths, attention.scale)
    y, exact = attend(*given).float(), attend_reference(*given).float()
    errors = [
        ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(decoded, (keys, values), strict=True)
    ]
    errors.append(((y - exact).norm() / exact.norm()).item())
    return {
        "kernels": has_kernels(layout, torch.device(device), torch.bfloat16),
        **dict(zip(("keys", "values", "attention"), errors, strict=True)),
    }


def start(args: argparse.Namespace, shape: dict[str, int]) -> tuple[Any, list[int] | None]:
    """The engine, and the bytes that each rank should hold."""
    from served import expected_bytes, write_model
    from vllm import LLM

    weights, _, kv_bits = args.one.partition(KV)
    longest = 2 * (args.prompt + args.new)
    backend: dict[str, Any] = {"distributed_executor_backend": "mp"} if args.tp > 1 else {}  # a rank alone does without
    if kv_bits:
        backend |= {"attention_backend": "CUSTOM", "additional_config": {"glq_kv_bits": int(kv_bits)}}
    if args.own_sums:
        backend.setdefault("additional_config", {})["glq_all_reduce"] = True
    if args.shape.startswith("tiny"):
        from glq.vllm_integration import methods

        methods.decodes_once = lambda: False  # where VLLM_ENABLE_V1_MULTIPROCESSING=0 has a rank alone in this process
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), weights, shape, args.tp, longest)
        expected = expected_bytes(Path(folder), weights, shape, args.tp)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_seqs=max(args.batch),
            enable_prefix_caching=False,
            enforce_eager=args.eager,
            max_num_batched_tokens=min(max(2048, max(args.batch) * args.prompt), LONGEST),
            gpu_memory_utilization=args.memory,
            kv_cache_memory_bytes=int(args.kv_gib * 2**30) if args.kv_gib else None,
            tensor_parallel_size=args.tp,
            disable_custom_all_reduce=args.nccl,
            compilation_config={} if args.eager else {"cudagraph_capture_sizes": captured(args)},
            **backend,
        )
    return llm, expected


def captured(args: argparse.Namespace) -> list[int]:
    """Of the sizes that vLLM captures, those that are timed: prompts come one or more at once."""
    return sorted({*args.batch, *range(args.prompt, args.capture + 1, 16)})


def check(llm: Any, expected: list[int] | None, args: argparse.Namespace) -> dict[str, Any]:
    """What the ranks hold, and how well they multiply.

    By collective_rpc, which hands a function on to the ranks by value; apply_model does it by its name, which is that
    of another object in vLLM's processes.
    """
    row: dict[str, Any] = {"weights": args.one, "shape": args.shape, "layers": args.layers, "tp": args.tp}
    row["weight_bytes"] = llm.collective_rpc(weight_bytes)
    row["expected_bytes"] = expected
    if on_gpu():
        row["loaded_bytes"] = llm.collective_rpc(loaded_bytes)
    cache = llm.llm_engine.vllm_config.cache_config
    row["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
    wrong = [a for a, b in zip(row["weight_bytes"], expected or (), strict=False) if abs(a - b) > WITHIN * b]
    if KV in args.one:
        row["kv_errors"] = llm.collective_rpc(kv_errors)
        if any(found["attention"] > 0.01 or found["keys"] > 0.5 for found in row["kv_errors"]):
            raise SystemExit(f"{args.one}: relative errors of the KV cache are {row['kv_errors']}: not timed")
    if args.one.partition("+")[0] in CODECS:
        row["errors"] = [a | b for a, b in zip(*map(llm.collective_rpc, (errors, expert_errors)), strict=True)]
        row["worst_error"] = max((e for found in row["errors"] for e in found.values()), default=None)
        if any(max(found.values(), default=float(on_gpu())) > 0.01 for found in row["errors"]):
            raise SystemExit(f"{args.one}: relative errors are {row['errors']}: not timed")
    if wrong and on_gpu():  # vLLM keeps others of its own on a CPU
        print(f"{args.one}: ranks hold {row['weight_bytes']} bytes, expected were {expected}", flush=True)
    return row


def on_gpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


@contextmanager
def turn(meeting: list[str] | None) -> Iterator[None]:
    """Alone with the machine: after all have started, one after the other. None ends before all have had a turn."""
    if not meeting:
        yield
        return
    folder, count = Path(meeting[0]), int(meeting[1])
    meet(folder, "ready", count)
    with (folder / "turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    meet(folder, "done", count)


def meet(folder: Path, state: str, count: int) -> None:
    """Wait until so many have come; who has not by then will not."""
    come(folder, state)
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob(f"{state}-*"))) < count and time.monotonic() < end:
        time.sleep(0.1)


def come(folder: Path, state: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{state}-{os.getpid()}-{time.time_ns()}").touch()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One kind of weights, in this process and those that vLLM starts."""
    from served import SHAPES

    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]  # transformers would import kernels.py from there
    import torch
    from vllm import SamplingParams

    shape = SHAPES[args.shape] | {"num_hidden_layers": args.layers}
    begun = time.perf_counter()
    llm, expected = start(args, shape)
    started = time.perf_counter() - begun
    row = check(llm, expected, args) | {"start_seconds": started}
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, new: int) -> float:
        ids = torch.randint(2, shape["vocab_size"], (batch, args.prompt), generator=generator).tolist()
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        spent = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != new for output in outputs):
            raise SystemExit(f"{args.one}: a request of {batch} did not get its {new} tokens")
        return spent

    with turn(args.meet):
        time_batches(row, args, seconds)
        print("timed", row, flush=True)
    return row


def time_batches(row: dict[str, Any], args: argparse.Namespace, seconds: Callable[[int, int], float]) -> None:
    """Add what is measured to the row."""
    for batch in args.batch:
        seconds(batch, args.new)
        whole = [seconds(batch, args.new) for _ in range(args.repeat)]
        first = [seconds(batch, 1) for _ in range(args.repeat)]
        median, prefill = statistics.median(whole), statistics.median(first)
        row[f"tokens_per_second_{batch}"] = batch * args.new / median
        row[f"decode_per_second_{batch}"] = batch * (args.new - 1) / (median - prefill)
        row[f"first_ms_{batch}"] = 1e3 * prefill
        row[f"seconds_{batch}"], row[f"first_seconds_{batch}"] = whole, first
        row[f"spread_{batch}"] = (max(whole) - min(whole)) / median
        step = 1e6 * (median - prefill) / (args.new - 1)
        row[f"step_us_{batch}"], row[f"step_us_a_layer_{batch}"] = step, step / args.layers


def main() -> None:
    from served import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="as many as the shape has, if not given")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--nccl", action="store_true", help="no sums over ranks but NCCL's")
    parser.add_argument("--own-sums", action="store_true", help="sums over ranks by glq's kernel, where they are small")
    parser.add_argument("--weights", nargs="*", default=["bf16", "int4", "trellis-4", "trellis-2"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.9, help="of the GPU's, for vLLM")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="shape", help="to try this out on a CPU")
    parser.add_argument(
        "--tiny-moe", action="store_const", const="tiny-moe", dest="shape", help="the same, with experts"
    )
    parser.add_argument("--capture", type=int, default=512, help="tokens of the longest step in a CUDA graph")
    parser.add_argument("--kv-gib", type=float, help="memory for keys and values; what is left, if not given")
    parser.add_argument("--meet", nargs=2, metavar=("FOLDER", "COUNT"), help="start together with others")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    if args.one:
        args.out.write_text(json.dumps(measure(args)), encoding="utf-8")
        return
    environment = os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # to send functions to ranks
    rows: list[dict[str, Any]] = []

    def run(weights: str, part: Path) -> None:
        options = [option for option in sys.argv[1:] if option != str(args.out)]
        done = subprocess.run([sys.executable, __file__, part, *options, "--one", weights], env=environment)
        if done.returncode and args.meet:  # nobody is to wait for it
            for state in ("ready", "done"):
                come(Path(args.meet[0]), state)
        row = (
            {"weights": weights, "failed": done.returncode} if done.returncode else json.loads(part.read_text("utf-8"))
        )
        rows.append(row)
        print(row, flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(args.weights) if args.meet else 1) as pool:
        list(pool.map(lambda weights: run(weights, Path(folder) / f"{weights}.json"), args.weights))


if __name__ == "__main__":
    main()
