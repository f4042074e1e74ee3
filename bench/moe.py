"""A layer of experts as transformers runs it, packed beside bf16, and what rounding one takes, on one GPU.

    python bench/moe.py OUT [--codec trellis-4] [--tokens 1 8 …]

Qwen3-30B-A3B's sizes. First a small random Qwen3-MoE is quantized on the GPU, its logits, loaded packed, are held to
those of its dequantized weights, and generate's with CUDA graphs to those without. Then a packed layer is held to the
same one dequantized, and both are timed, the median over replays of a CUDA graph that goes through tokens of its own
each time; bf16 is transformers' grouped product, as transformers calls it. Last, some experts are rounded. OUT gets
moe.json.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from kernels import time_graph
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import glq
from glq.calibration import Group
from glq.config import ModuleConfig
from glq.experts import DenseExperts
from glq.moments import Moments
from glq.quant_experts import QuantExperts
from glq.rotation import block_width
from glq.rounder import Choice, GroupRounder
from glq.workers import Devices
from glq.writer import CheckpointWriter

EXPERTS, TOP_K, HIDDEN, INSIDE = 128, 8, 2048, 768


def small_model(folder: Path) -> Path:
    """One whose text is random ids: the tokenizer knows them as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {"hidden_size": 512, "moe_intermediate_size": 192, "num_experts": 16, "num_experts_per_tok": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 4}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, **heads, vocab_size=1000, norm_topk_prob=True, tie_word_embeddings=False)
    config.initializer_range, config.eos_token_id = 0.05, None
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in torch.randint(0, 1000, (70_000,)).tolist()))
    return folder / "model"


def check_model(codec: str) -> dict[str, float]:
    """Relative error of packed logits, the median of tokens, and how many tokens of generate differ with graphs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, start = small_model(folder), time.monotonic()
        settings = glq.Settings(float(codec.rpartition("-")[2]), codec, tokens=32768, ctx=512)
        glq.quantize(model, folder / "out", settings, calibration=folder / "text.txt", device="cuda")
        seconds = time.monotonic() - start
        packed, again = (
            AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).eval().to("cuda")
            for _ in range(2)
        )
    ids, dense = torch.randint(0, 1000, (2, 64), device="cuda"), again.dequantize(torch.float32)
    with torch.inference_mode():
        y, z = packed(ids).logits, dense(ids).logits
        off = ((y - z).norm(dim=-1) / z.norm(dim=-1)).median().item()  # a few tokens may tie between experts
        half = packed.to(torch.bfloat16)
        plain = half.generate(ids[:1, :8], max_new_tokens=32, do_sample=False)
        graphs = half.generate(ids[:1, :8], max_new_tokens=32, do_sample=False, cache_implementation="static")
    different = (plain != graphs).sum().item()
    assert off < 5e-3, f"packed logits are {off} off"
    return {"quantize_s": seconds, "fp32_logits_off": off, "tokens_that_differ_in_graphs": different}


def layers(codec: str) -> tuple[QuantExperts, torch.nn.Module]:
    """Random codes, packed and dequantized, in bf16."""
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INSIDE, "num_experts": EXPERTS, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=TOP_K, vocab_size=8)
    with torch.device("meta"):
        experts = Qwen3MoeForCausalLM(config).model.layers[0].mlp.experts
    shapes = {"gate_proj": (INSIDE, HIDDEN), "up_proj": (INSIDE, HIDDEN), "down_proj": (HIDDEN, INSIDE)}
    modules = {n: ModuleConfig(codec, cols, rows, block_width(cols), EXPERTS) for n, (rows, cols) in shapes.items()}
    packed = QuantExperts(experts, modules).to("cuda")
    for name, (_, cols) in shapes.items():
        part = getattr(packed, name)
        part.codes, part.scale = part.codes.random_(), (torch.rand_like(part.scale, dtype=torch.float32) + 0.5).half()
        part.scale = part.scale / cols**0.5
        part.signs = part.signs[:1].random_().repeat(EXPERTS, 1)
    packed.up_proj.signs = packed.gate_proj.signs.clone()
    packed.join()
    assert packed._joint is not None
    return packed, copy.deepcopy(packed).dequantize(torch.bfloat16)


def time_layer(codec: str, counts: list[int]) -> list[dict[str, float]]:
    packed, dense = layers(codec)
    rows = []
    for tokens in counts:
        calls = max(2, min(16, 256 // tokens))
        inputs = []
        for _ in range(calls):
            route = torch.rand(tokens, EXPERTS, device="cuda").argsort(1)[:, :TOP_K].contiguous()
            weights = torch.rand(tokens, TOP_K, device="cuda").softmax(1).bfloat16()
            inputs.append((torch.randn(tokens, HIDDEN, device="cuda").bfloat16(), route, weights))
        y, z = packed(*inputs[0]).float(), dense(*inputs[0]).float()
        off = ((y - z).norm() / z.norm()).item()
        assert off < 0.02, f"{tokens} tokens: {off} off"
        us = time_graph([lambda i=i: packed(*i) for i in inputs])
        try:
            bf16 = time_graph([lambda i=i: dense(*i) for i in inputs])
        except RuntimeError as error:  # transformers' product may not be one that can be captured
            print(f"bf16, {tokens} tokens: {str(error).splitlines()[0]}")
            bf16 = float("nan")
        rows.append({"tokens": tokens, "us": us, "bf16_us": bf16, "off": off})
        print(f"{tokens:5} tokens: {us:8.1f} µs, bf16 {bf16:8.1f} µs, {bf16 / us:5.2f}×, error {off:.4f}", flush=True)
    return rows


def time_rounding(codec: str, count: int = 4) -> float:
    """Seconds for an expert, after the first, which captures graphs."""
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INSIDE, "num_experts": count + 1, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=1, vocab_size=8)
    experts = DenseExperts(Qwen3MoeForCausalLM(config).model.layers[0].mlp.experts).to("cuda")
    with tempfile.TemporaryDirectory() as name, CheckpointWriter(Path(name) / "out") as writer, torch.no_grad():
        rounder = GroupRounder(writer, Devices([torch.device("cuda")]), 0, 0.1)
        start = 0.0
        for expert in range(count + 1):
            for product, entries in zip(experts.products, (("e.*.g", "e.*.u"), ("e.*.d",)), strict=True):
                product.entries = entries
                x = torch.randn(8192, product.in_features, device="cuda")
                moments = Moments(x.T @ x / len(x), torch.zeros(x.shape[1], x.shape[1], device="cuda"))
                group = Group(product.linears(expert), moments, expert, len(x))
                rounder(Choice(group, dict.fromkeys(entries, codec)))
            torch.cuda.synchronize()
            start = start or time.monotonic()
        return (time.monotonic() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codec", default="trellis-4")
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 16, 64, 512, 2048])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"card": torch.cuda.get_device_name(), "codec": args.codec}
    for key, measure in (
        ("model", lambda: check_model(args.codec)),
        ("layer", lambda: time_layer(args.codec, args.tokens)),
        ("seconds_an_expert", lambda: time_rounding(args.codec)),
    ):
        found[key] = measure()
        print(key, found[key], flush=True)
        (args.out / "moe.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
