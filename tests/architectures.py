"""Small random models of many architectures, for tests/test_architectures.py and tools/list_models.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

_SIZES = {
    "vocab_size": 302,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM has on a CPU
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # larger than by default: tokens differ, and so do the experts they go to
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
_ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_KINDS = ["sliding_attention", "full_attention"]
_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": _KINDS * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 302,
}


@dataclass(frozen=True)
class Architecture:
    """A model of transformers by its classes' names, and what is special about it.

    vllm: why it is not compared in vLLM; nothing if it is. bf16: whether vLLM computes it in bf16 alone on a CPU.
    """

    name: str
    config: str
    model: str
    special: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    wrap: Callable[[dict[str, Any]], dict[str, Any]] = dict
    vllm: str = ""
    bf16: bool = False

    def build(self) -> Any:
        sizes = {key: value for key, value in (_SIZES | self.changes).items() if key not in self.without}
        config = getattr(transformers, self.config)(**self.wrap(sizes))
        return getattr(transformers, self.model)(config)


def _multimodal(vision: dict[str, Any], **more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda text: {"text_config": text, "vision_config": vision} | more


_HEAD = ("head_dim",)
_TIED = {"tie_word_embeddings": True}  # as all published Gemmas are; vLLM has no others
ARCHITECTURES = [
    Architecture("Llama", "LlamaConfig", "LlamaForCausalLM"),
    Architecture("Mistral", "MistralConfig", "MistralForCausalLM"),
    Architecture("Qwen2", "Qwen2Config", "Qwen2ForCausalLM", "biases of q, k, v"),
    Architecture("Qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
    Architecture("Qwen3-MoE", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", "experts", _EXPERTS),
    Architecture(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        "experts, one of them shared",
        _EXPERTS | {"shared_expert_intermediate_size": 48},
    ),
    Architecture("SmolLM3", "SmolLM3Config", "SmolLM3ForCausalLM"),
    Architecture("Gemma 2", "Gemma2Config", "Gemma2ForCausalLM", "", _TIED),
    Architecture("Gemma 3 (text)", "Gemma3TextConfig", "Gemma3ForCausalLM", "", _TIED | {"sliding_window": 32}),
    Architecture(
        "Gemma 3 (images)",
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        "vision tower and projector in 16 bits",
        {"sliding_window": 32},
        wrap=_multimodal(_VISION | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4),
    ),
    Architecture(
        "Gemma 3n",
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        "several residual streams; embeddings of each layer and what predicts streams in 16 bits",
        _SHARED
        | _TIED
        | {"hidden_size_per_layer_input": 16, "laurel_rank": 16, "altup_num_inputs": 2, "intermediate_size": [96] * 4}
        | {"activation_sparsity_pattern": [0.0] * 4},
    ),
    Architecture(
        "Gemma 4 (E4B's kind)",
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        "later layers read keys and values of earlier ones; embeddings of each layer and vision tower in 16 bits",
        _SHARED | {"hidden_size_per_layer_input": 32, "global_head_dim": 32, "num_global_key_value_heads": 1},
        wrap=_multimodal(_VISION | {"num_key_value_heads": 2, "head_dim": 16}, audio_config=None),
    ),
    Architecture(
        "Gemma 4 (26B-A4B's kind)",
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        "experts beside an MLP",
        {"layer_types": _KINDS, "hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_kv_shared_layers": 0}
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
        | {"num_global_key_value_heads": 1},
        wrap=_multimodal(_VISION | {"num_key_value_heads": 2, "head_dim": 16}, audio_config=None),
    ),
    Architecture("Phi-3, Phi-4", "Phi3Config", "Phi3ForCausalLM", "q, k, v, and gate and up, as one matrix"),
    Architecture("OLMo 2", "Olmo2Config", "Olmo2ForCausalLM"),
    Architecture("Granite", "GraniteConfig", "GraniteForCausalLM"),
    Architecture(
        "Mixtral", "MixtralConfig", "MixtralForCausalLM", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    Architecture(
        "gpt-oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        "experts with biases, rows of gate and up in turn; from MXFP4 or 16-bit weights",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32, "layer_types": _KINDS},
    ),
    Architecture(
        "DeepSeek-V3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        "multi-head latent attention; experts, one of them shared",
        _ROUTED | _LATENT | {"num_key_value_heads": 2, "n_group": 2, "topk_method": "noaux_tc"},
        _HEAD,
        vllm="loads; differs from transformers there as its 16-bit model does",
    ),
    Architecture("GLM-4", "Glm4Config", "Glm4ForCausalLM"),
    Architecture("GLM-4-MoE", "Glm4MoeConfig", "Glm4MoeForCausalLM", "experts, one of them shared", _ROUTED),
    Architecture(
        "Mamba-2",
        "Mamba2Config",
        "Mamba2ForCausalLM",
        "its linear layers",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
        ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    ),
    Architecture(
        "Bamba",
        "BambaConfig",
        "BambaForCausalLM",
        "Mamba-2 and attention in turn",
        {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
        _HEAD,
        vllm="not there",
    ),
    Architecture(
        "Falcon-H1",
        "FalconH1Config",
        "FalconH1ForCausalLM",
        "Mamba-2 beside attention",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    Architecture(
        "Jamba",
        "JambaConfig",
        "JambaForCausalLM",
        "Mamba and attention in turn, experts; dt_proj in 16 bits",
        {"num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
        _HEAD,
        vllm="its Mamba has no kernel for a CPU there",
    ),
    Architecture(
        "Nemotron-H",
        "NemotronHConfig",
        "NemotronHForCausalLM",
        "Mamba-2, attention and MLPs in turn",
        {"hybrid_override_pattern": "M*-", "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16}
        | {"n_groups": 1, "num_hidden_layers": 3},
    ),
    Architecture(
        "Qwen3-Next",
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        "linear attention and attention in turn; experts",
        _EXPERTS
        | {"shared_expert_intermediate_size": 48, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
        | {
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention", "full_attention"],
        },
        bf16=True,
    ),
    Architecture(
        "LFM2",
        "Lfm2Config",
        "Lfm2ForCausalLM",
        "short convolutions and attention in turn",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32, "conv_dim": 64, "block_dim": 64},
        vllm="loads; differs from transformers there as its 16-bit model does",
    ),
]
