"""The models that serve.py serves: config.json of a shape with random codes, and what its ranks should hold.

A Llama's; or, where a shape has experts, that of a Qwen3 mixture of them.
"""

import json
import math
from pathlib import Path
from typing import Any

from glq.codecs import CODECS
from glq.config import GlqConfig, ModuleConfig
from glq.packed import packed_bytes
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
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
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
SHAPES["tiny-moe"] = SHAPES["tiny"] | {
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 64,
}
ROW_PARALLEL = ("o_proj", "down_proj")
HEAD = "+head"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}


def matrices(weights: str, shape: Shape) -> dict[str, tuple[int, int]]:
    """Name of each quantized layer → (out, in)."""
    found = {f"model.layers.{i}.{k}": v for i in range(shape["num_hidden_layers"]) for k, v in of_layer(shape).items()}
    return found | ({"lm_head": (shape["vocab_size"], shape["hidden_size"])} if weights.endswith(HEAD) else {})


def of_layer(shape: Shape) -> dict[str, tuple[int, int]]:
    """The matrices of a decoder layer → (out, in); with a * in the name one of each expert."""
    hidden, experts = shape["hidden_size"], shape.get("num_experts")
    head, middle = head_dim(shape), shape["moe_intermediate_size" if experts else "intermediate_size"]
    q, kv = head * shape["num_attention_heads"], head * shape["num_key_value_heads"]
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}
    folder = "mlp.experts.*" if experts else "mlp"
    return {f"self_attn.{k}": v for k, v in attention.items()} | {f"{folder}.{k}": v for k, v in mlp.items()}


def head_dim(shape: Shape) -> int:
    return shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])


def plain(weights: str, shape: Shape) -> dict[str, tuple[tuple[int, ...], int]]:
    """What is not quantized, in 16 bits, by name: shape and bytes."""
    hidden, ends = shape["hidden_size"], (shape["vocab_size"], shape["hidden_size"])
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends, "lm_head.weight": ends}
    found["model.norm.weight"] = (hidden,)
    for i in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (hidden,)
        if experts := shape.get("num_experts"):
            found[f"model.layers.{i}.mlp.gate.weight"] = (experts, hidden)
            found |= {f"model.layers.{i}.self_attn.{x}_norm.weight": (head_dim(shape),) for x in "qk"}
    if weights == "bf16":
        for name, size in matrices(weights, shape).items():
            numbers = range(shape["num_experts"]) if "*" in name else [0]
            found |= {f"{name.replace('*', str(e))}.weight": size for e in numbers}
    elif weights.endswith(HEAD):
        del found["lm_head.weight"]
    return {name: (dims, 2 * math.prod(dims)) for name, dims in found.items()}


def modules(weights: str, shape: Shape, ranks: int) -> dict[str, ModuleConfig]:
    """The entries of a checkpoint's config, with rotations that stay inside of the ranks' shards; none in 16 bits."""
    codec, found = weights.removesuffix(HEAD), {}
    for name, (out, width) in matrices(weights, shape).items() if codec in CODECS else ():
        shards = ranks if name.endswith(ROW_PARALLEL) else 1
        experts = shape["num_experts"] if "*" in name else None
        found[name] = ModuleConfig(codec, width, out, block_width(width, shards), experts)
    return found


def quantization(weights: str, shape: Shape, ranks: int) -> dict[str, Any] | None:
    """The quantization_config of config.json."""
    if weights == "bf16":
        return None
    if weights == "int4":
        return GPTQ
    found = modules(weights, shape, ranks)
    nbytes = sum((m.experts or 1) * packed_bytes(m.codec, m.out_features, m.in_features) for m in found.values())
    bits = 8 * nbytes / sum(m.weights for m in found.values())
    return GlqConfig(found, round(bits, 4), "bench", ranks).to_dict()


def expected_bytes(folder: Path, weights: str, shape: Shape, ranks: int) -> list[int] | None:
    """What each rank should hold, as `glq info --tp` counts it; None for int4, which glq knows nothing of."""
    from transformers import AutoConfig

    from glq.vllm_integration.shares import shares

    if weights == "int4":
        return None
    config = AutoConfig.from_pretrained(folder)
    return [s.total for s in shares(modules(weights, shape, ranks), config, plain(weights, shape), ranks)]


def write_model(folder: Path, weights: str, shape: Shape, ranks: int, longest: int) -> None:
    experts = "num_experts" in shape
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if experts else "llama",
        "torch_dtype": "bfloat16",
        "max_position_embeddings": max(8192, longest),
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
