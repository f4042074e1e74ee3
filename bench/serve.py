"""Tokens a second, KV tokens and weights' memory in vLLM: random codes of a Llama's shape beside bf16 and GPTQ's int4.

    python bench/serve.py OUT.json [--weights bf16 int4 trellis-4 trellis-2] [--batch 1 8 32] [--prompt 128] [--new 128]
        [--shape llama-3-8b | llama-3-70b] [--layers 20] [--tp 2]

trellis-4+head has lm_head in these codes, too; the others leave it in 16 bits.
glq has to be installed, not only on the path: vLLM finds the plugin by its entry point. Each kind of weights is served
by a process of its own from a directory that holds a config.json alone (load_format="dummy"), so that all of them have
the machine to themselves in one run. What a quantized layer computes, and how many bytes each rank holds, is checked
before anything is timed. CUDA graphs are captured for the batches that are timed, and no others.

An engine takes two minutes to start. --meet FOLDER COUNT has the COUNT engines that meet in the folder, of this run and
others, start at the same time and then be timed one after the other, with --kv-gib of memory for keys and values each.
"""

import argparse
import fcntl
import json
import math
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
from glq.config import GlqConfig, ModuleConfig
from glq.packed import PACKED_DTYPES, packed_shapes
from glq.rotation import block_width

Shape = dict[str, int]
SHAPES: dict[str, Shape] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
ROW_PARALLEL = ("o_proj", "down_proj")
WITHIN = 0.03  # of what is expected, the bytes that a rank holds
HEAD = "+head"
PATIENCE = 120  # seconds that an engine waits for others
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}


def matrices(weights: str, shape: Shape) -> dict[str, tuple[int, int]]:
    """Name of each quantized layer → (out, in)."""
    found = {f"model.layers.{i}.{k}": v for i in range(shape["num_hidden_layers"]) for k, v in of_layer(shape).items()}
    return found | ({"lm_head": (shape["vocab_size"], shape["hidden_size"])} if weights.endswith(HEAD) else {})


def of_layer(shape: Shape) -> dict[str, tuple[int, int]]:
    """The matrices of a decoder layer → (out, in)."""
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}
    return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}


def plain(weights: str, shape: Shape) -> dict[str, tuple[tuple[int, ...], int]]:
    """What is not quantized, in 16 bits, by name: shape and bytes."""
    hidden, ends = shape["hidden_size"], (shape["vocab_size"], shape["hidden_size"])
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends, "lm_head.weight": ends}
    found["model.norm.weight"] = (hidden,)
    for i in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (hidden,)
    if weights == "bf16":
        found |= {f"{name}.weight": size for name, size in matrices(weights, shape).items()}
    elif weights.endswith(HEAD):
        del found["lm_head.weight"]
    return {name: (dims, 2 * math.prod(dims)) for name, dims in found.items()}


def modules(weights: str, shape: Shape, ranks: int) -> dict[str, ModuleConfig]:
    """The entries of a checkpoint's config, with rotations that stay inside of the ranks' shards; none in 16 bits."""
    codec, found = weights.removesuffix(HEAD), {}
    for name, (out, width) in matrices(weights, shape).items() if codec in CODECS else ():
        shards = ranks if name.endswith(ROW_PARALLEL) else 1
        found[name] = ModuleConfig(codec, width, out, block_width(width, shards))
    return found


def quantization(weights: str, shape: Shape, ranks: int) -> dict[str, Any] | None:
    """The quantization_config of config.json."""
    if weights == "bf16":
        return None
    if weights == "int4":
        return GPTQ
    found = modules(weights, shape, ranks)
    shapes = ((key, dims) for m in found.values() for key, dims in packed_sizes(m).items())
    nbytes = sum(PACKED_DTYPES[key].itemsize * math.prod(dims) for key, dims in shapes)
    bits = 8 * nbytes / sum(m.weights for m in found.values())
    return GlqConfig(found, round(bits, 4), "bench", ranks).to_dict()


def packed_sizes(m: ModuleConfig) -> dict[str, tuple[int, ...]]:
    return packed_shapes(m.codec, m.out_features, m.in_features)


def expected_bytes(folder: Path, weights: str, shape: Shape, ranks: int) -> list[int] | None:
    """What each rank should hold, as `glq info --tp` counts it; None for int4, which glq knows nothing of."""
    from transformers import AutoConfig

    from glq.vllm_integration.shares import shares

    if weights == "int4":
        return None
    config = AutoConfig.from_pretrained(folder)
    return [s.total for s in shares(modules(weights, shape, ranks), config, plain(weights, shape), ranks)]


def write_model(folder: Path, weights: str, shape: Shape, ranks: int) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        **shape,
    }
    found = quantization(weights, shape, ranks)
    config |= {"quantization_config": found} if found else {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def weight_bytes(worker: Any) -> int:
    """Of all parameters on a rank, each counted once."""
    model = worker.get_model()
    return sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.parameters()}.values())


def loaded_bytes(worker: Any) -> int:
    """By how much vLLM saw a GPU's memory shrink while it loaded the model."""
    return int(worker.model_runner.model_memory_usage)


def errors(worker: Any) -> dict[str, float]:
    """Of the first packed layers on a rank, for 1 to 600 tokens, relative to the product with the decoded weight.

    Nothing if there are none: on a CPU, where weights are decoded once.
    """
    import torch

    from glq.vllm_integration.parts import dequantize

    found: dict[str, float] = {}
    for layer in [m for m in worker.get_model().modules() if hasattr(m, "glq_runs")][:4]:
        packed = layer.weight_packed if hasattr(layer, "weight_packed") else layer.weight
        weight = dequantize(packed, layer.scale, layer.signs, layer.glq_parts, torch.float32)
        for tokens in (1, 8, 32, 600):
            x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=torch.bfloat16)
            exact = torch.cat([x.double() @ rows.double().T for rows in weight.split(4096)], 1)
            y = layer.quant_method.apply(layer, x)
            error = ((y.double() - exact).norm() / exact.norm()).item()
            found[layer.glq_name] = max(found.get(layer.glq_name, 0.0), error)
        del weight
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # other engines may be starting on this GPU
    return found


def start(args: argparse.Namespace, shape: Shape) -> tuple[Any, list[int] | None]:
    """The engine, and the bytes that each rank should hold."""
    from vllm import LLM

    backend = {"distributed_executor_backend": "mp"} if args.tp > 1 else {}  # which a rank alone does without
    if args.shape == "tiny":
        from glq.vllm_integration import methods

        methods.decodes_once = lambda: False  # where VLLM_ENABLE_V1_MULTIPROCESSING=0 has a rank alone in this process
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.one, shape, args.tp)
        expected = expected_bytes(Path(folder), args.one, shape, args.tp)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2 * (args.prompt + args.new),
            max_num_seqs=max(args.batch),
            enable_prefix_caching=False,
            enforce_eager=args.eager,
            max_num_batched_tokens=max(2048, max(args.batch) * args.prompt),
            gpu_memory_utilization=args.memory,
            kv_cache_memory_bytes=int(args.kv_gib * 2**30) if args.kv_gib else None,
            tensor_parallel_size=args.tp,
            disable_custom_all_reduce=args.nccl,
            compilation_config={} if args.eager else {"cudagraph_capture_sizes": sorted(args.batch)},
            **backend,
        )
    return llm, expected


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
    if args.one.removesuffix(HEAD) in CODECS:
        row["errors"] = llm.collective_rpc(errors)
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
        row[f"spread_{batch}"] = (max(whole) - min(whole)) / median
        step = 1e6 * (median - prefill) / (args.new - 1)
        row[f"step_us_{batch}"], row[f"step_us_a_layer_{batch}"] = step, step / args.layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="as many as the shape has, if not given")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--nccl", action="store_true", help="no sums over ranks but NCCL's")
    parser.add_argument("--weights", nargs="*", default=["bf16", "int4", "trellis-4", "trellis-2"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.9, help="of the GPU's, for vLLM")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="shape", help="to try this out on a CPU")
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
