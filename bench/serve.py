"""Tokens a second, KV tokens and weights' memory in vLLM: random codes of a Llama's shape beside bf16 and GPTQ's int4.

    python bench/serve.py OUT.json [--weights bf16 int4 trellis-4 trellis-2] [--batch 1 8 32] [--prompt 128] [--new 128]

trellis-4+head has lm_head in these codes, too; the others leave it in 16 bits.
glq has to be installed, not only on the path: vLLM finds the plugin by its entry point. Each kind of weights is served
by a process of its own from a directory that holds a config.json alone (load_format="dummy"), so that all of them have
the machine to themselves in one run. What a quantized layer computes is checked before anything is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from glq.codecs import CODECS
from glq.config import GlqConfig, ModuleConfig
from glq.packed import PACKED_DTYPES, packed_shapes
from glq.rotation import block_width

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
HEAD = "+head"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}


def matrices(weights: str, shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Name of each quantized layer → (out, in)."""
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}
    named = {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}
    found = {f"model.layers.{i}.{k}": v for i in range(shape["num_hidden_layers"]) for k, v in named.items()}
    return found | ({"lm_head": (shape["vocab_size"], hidden)} if weights.endswith(HEAD) else {})


def stored_bytes(codec: str, out: int, width: int) -> int:
    """Codes, scales and signs of one matrix, as `glq info` counts them."""
    shapes = packed_shapes(codec, out, width)
    total = 0
    for key, dims in shapes.items():
        count = PACKED_DTYPES[key].itemsize
        for n in dims:
            count *= n
        total += count
    return total


def quantization(weights: str, shape: dict[str, int]) -> dict[str, Any] | None:
    """The quantization_config of config.json."""
    if weights == "bf16":
        return None
    if weights == "int4":
        return GPTQ
    sizes, codec = matrices(weights, shape), weights.removesuffix(HEAD)
    modules = {name: ModuleConfig(codec, width, out, block_width(width)) for name, (out, width) in sizes.items()}
    nbytes = sum(stored_bytes(codec, *size) for size in sizes.values())
    bits = 8 * nbytes / sum(out * width for out, width in sizes.values())
    return GlqConfig(modules, round(bits, 4), "bench").to_dict()


def write_model(folder: Path, weights: str, shape: dict[str, int]) -> None:
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
    found = quantization(weights, shape)
    config |= {"quantization_config": found} if found else {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def weight_bytes(model: Any) -> int:
    """Of all parameters on a rank, each counted once."""
    return sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.parameters()}.values())


def worst_error(model: Any) -> float | None:
    """Of the first packed layers with 1, 8, 32 and 600 tokens, relative to the product with the decoded weight.

    None if there are none: on a CPU, where weights are decoded once.
    """
    import torch

    from glq.vllm_integration.parts import dequantize

    worst = 0.0
    packed = [m for m in model.modules() if hasattr(m, "glq_runs")][:4]
    for layer in packed:
        weight = dequantize(layer.weight_packed, layer.scale, layer.signs, layer.glq_parts, torch.float32).double()
        for tokens in (1, 8, 32, 600):
            x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=torch.bfloat16)
            exact = x.double() @ weight.T
            y = layer.quant_method.apply(layer, x)
            worst = max(worst, ((y.double() - exact).norm() / exact.norm()).item())
    return worst if packed else None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One kind of weights, in this process."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]  # transformers would import kernels.py from there
    import torch
    from vllm import LLM, SamplingParams

    shape = TINY if args.tiny else LLAMA_3_8B
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.one, shape)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2 * (args.prompt + args.new),
            max_num_seqs=max(args.batch),
            enable_prefix_caching=False,
            enforce_eager=args.eager,
            gpu_memory_utilization=args.memory,
        )
    row: dict[str, Any] = {"weights": args.one, "weight_bytes": llm.apply_model(weight_bytes)[0]}
    cache = llm.llm_engine.vllm_config.cache_config
    row["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
    codec = args.one.removesuffix(HEAD)
    if codec in CODECS:
        row["worst_error"] = llm.apply_model(worst_error)[0]
        sizes = matrices(args.one, shape)
        ends = 2 * (1 if "lm_head" in sizes else 2) * shape["vocab_size"] * shape["hidden_size"]
        norms = 2 * shape["hidden_size"] * (2 * shape["num_hidden_layers"] + 1)
        row["expected_bytes"] = sum(stored_bytes(codec, *size) for size in sizes.values()) + ends + norms
        if torch.cuda.is_available() and (row["worst_error"] is None or row["worst_error"] > 0.01):
            raise SystemExit(f"{args.one}: its relative error is {row['worst_error']}: not timed")
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

    for batch in args.batch:
        seconds(batch, args.new)
        whole = [seconds(batch, args.new) for _ in range(args.repeat)]
        first = [seconds(batch, 1) for _ in range(args.repeat)]
        median, prefill = statistics.median(whole), statistics.median(first)
        row[f"tokens_per_second_{batch}"] = batch * args.new / median
        row[f"decode_per_second_{batch}"] = batch * (args.new - 1) / (median - prefill)
        row[f"spread_{batch}"] = (max(whole) - min(whole)) / median
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", nargs="*", default=["bf16", "int4", "trellis-4", "trellis-2"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.9, help="of the GPU's, for vLLM")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try this file out on a CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(measure(args)), encoding="utf-8")
        return
    environment = os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # apply_model sends functions to the engine
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in args.weights:
            part = Path(folder) / f"{weights}.json"
            options = [option for option in sys.argv[1:] if option != str(args.out)]
            done = subprocess.run([sys.executable, __file__, part, *options, "--one", weights], env=environment)
            if done.returncode:
                rows.append({"weights": weights, "failed": done.returncode})
            else:
                rows.append(json.loads(part.read_text(encoding="utf-8")))
            print(rows[-1], flush=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
