"""Tokens a second of `generate` with random weights of a Llama's shape, quantized and in bf16, both in CUDA graphs.

    python bench/generate.py OUT.json [--codecs trellis-4 …] [--batch 1] [--prompt 128] [--new 128] [--layers 32]
                                      [--compile]

--compile has transformers compile both models (Inductor, which captures graphs, too) in the place of our graphs. Both
models write from the same prompt into a static cache. The quantized model's layers are fused as those of a loaded one.
Before it is timed, its first block's layers are checked against PyTorch's products with their dequantized weights.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from glq.codecs import CODECS
from glq.fused import fuse
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


def dense_model(layers: int, device: str = "cuda", **changes: int) -> LlamaForCausalLM:
    """Random bf16 weights."""
    config = LlamaConfig(**LLAMA_3_8B | changes, num_hidden_layers=layers, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.02)
    width = config.head_dim
    inverse = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, device=device) / width)
    model.model.rotary_emb.inv_freq.copy_(inverse)
    decode_in_graphs(model)
    return model.eval()


def quantize_randomly(model: LlamaForCausalLM, codec: str) -> None:
    """Layers of random codes, whose weights have the size of the dense ones, in place of the decoder's; fused.

    Layers of one module that read as many channels have the same signs, as q/k/v and gate/up of a checkpoint have.
    """
    signs: dict[tuple[str, int], torch.Tensor] = {}
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear | QuantLinear):
            rows, cols = module.out_features, module.in_features
            layer = QuantLinear(cols, rows, codec, block_width(cols), device=model.device)
            layer.codes.random_(0, 256)
            source = "o_proj" if name.endswith("o_proj") else name.rpartition(".")[0]
            layer.signs.copy_(signs.setdefault((source, cols), torch.randint_like(layer.signs, 0, 256)))
            layer.scale.fill_(0.02)
            model.model.layers.set_submodule(name, layer)
    fuse(model)


@torch.no_grad()
def check(model: LlamaForCausalLM) -> None:
    """The layers of the first block, with one token and with many, against PyTorch's products."""
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    for group in (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ):
        for tokens in (1, 128):
            x = torch.randn(tokens, group[0].in_features, device=model.device, dtype=torch.bfloat16)
            for layer, y in [(layer, layer(x)) for layer in group]:
                dense = layer.dequantize(torch.bfloat16)
                exact = x.double() @ dense.weight.double().T
                error, plain = ((z.double() - exact).norm().item() for z in (y, dense(x)))
                assert error < 2 * plain + 0.003 * exact.norm().item(), (error, plain)


def speed(model: LlamaForCausalLM, batch: int, prompt: int, new: int, compiled: bool) -> float:
    """New tokens a second, all sequences together; the best of three."""
    ids = torch.randint(0, 1000, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=prompt + new)  # one for all runs: nothing is compiled again
    how = {"compile_config": CompileConfig()} if compiled else {}

    def run(count: int) -> float:
        cache.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, past_key_values=cache, **how)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for count in (8, new):
        run(count)  # compiles and captures
    return max(batch * (new - 8) / (run(new) - run(8)) for _ in range(3))  # prefill cancels out


def forget_compiled(model: LlamaForCausalLM) -> None:
    """What was compiled for other layers: guards would count each as a recompilation."""
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codecs", nargs="*", choices=list(CODECS), default=["trellis-4", "trellis-3", "trellis-2"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    model = dense_model(args.layers)
    rows: list[dict[str, Any]] = []
    for name in ("bf16", *args.codecs):
        if name != "bf16":
            quantize_randomly(model, name)
            check(model)
        forget_compiled(model)
        tokens = speed(model, args.batch, args.prompt, args.new, args.compile)
        rows.append(
            {
                "weights": name,
                "by": "torch.compile" if args.compile else "graphs",
                "tokens_per_second": tokens,
                "of_bf16": tokens / rows[0]["tokens_per_second"] if rows else 1,
            }
        )
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
