"""Tokens a second of `generate` with random weights of a Llama's shape, quantized and in bf16, both in CUDA graphs.

    python bench/generate.py OUT.json [--codecs trellis-4 …] [--batch 1] [--prompt 128] [--new 128] [--layers 32]

Both models write from the same prompt into the same static cache. Before it is timed, a quantized model's logits are
checked against those of its dequantized first layers.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from glq.codecs import CODECS
from glq.graphs import decode_in_graphs
from glq.linear import QuantLinear
from glq.rotation import block_width

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


def dense_model(layers: int) -> LlamaForCausalLM:
    """Random bf16 weights, on the GPU."""
    config = LlamaConfig(**LLAMA_3_8B, num_hidden_layers=layers, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cuda")
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.02)
    inverse = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 128, 2, device="cuda") / 128)
    model.model.rotary_emb.inv_freq.copy_(inverse)
    decode_in_graphs(model)
    return model.eval()


def quantize_randomly(model: LlamaForCausalLM, codec: str) -> None:
    """Layers of random codes, whose weights have the size of the dense ones, in place of the decoder's."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear | QuantLinear):
            rows, cols = module.out_features, module.in_features
            block = block_width(cols)
            layer = QuantLinear(cols, rows, codec, block, device="cuda")
            layer.codes.copy_(torch.randint(0, 256, layer.codes.shape, dtype=torch.uint8, device="cuda"))
            layer.signs.copy_(torch.randint(0, 256, layer.signs.shape, dtype=torch.uint8, device="cuda"))
            layer.scale.fill_(0.02)
            model.model.layers.set_submodule(name, layer)


@torch.no_grad()
def check(model: LlamaForCausalLM) -> None:
    """A layer of each shape, with one token and with many, against PyTorch's product."""
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.down_proj):
        dense = layer.dequantize(torch.bfloat16)
        for tokens in (1, 128):
            x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
            exact = x.double() @ dense.weight.double().T
            error, plain = ((y.double() - exact).norm().item() for y in (layer(x), dense(x)))
            assert error < 2 * plain + 0.003 * exact.norm().item(), (error, plain)


def speed(model: LlamaForCausalLM, batch: int, prompt: int, new: int) -> float:
    """New tokens a second, all sequences together; the best of three."""
    ids = torch.randint(0, 1000, (batch, prompt), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def run(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, cache_implementation="static")
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(4)
    return max(batch * (new - 8) / (run(new) - run(8)) for _ in range(3))  # prefill and capture cancel out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codecs", nargs="*", choices=list(CODECS), default=["trellis-4", "trellis-3", "trellis-2"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    model = dense_model(args.layers)
    rows: list[dict[str, Any]] = []
    for name in ("bf16", *args.codecs):
        if name != "bf16":
            quantize_randomly(model, name)
            check(model)
        tokens = speed(model, args.batch, args.prompt, args.new)
        rows.append(
            {
                "weights": name,
                "tokens_per_second": tokens,
                "of_bf16": tokens / rows[0]["tokens_per_second"] if rows else 1,
            }
        )
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
