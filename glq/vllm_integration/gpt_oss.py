"""gpt-oss in vLLM, whose model takes experts under the names of its own formats alone: here is one that takes ours.

A tensor of one expert, `model.layers.0.mlp.experts.3.gate_up_proj.codes`, finds a parameter of that name, which passes
it on to the one of all experts. Biases come as in vLLM's own class, all experts' at once.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from glq.vllm_integration.experts import ExpertsLoader, GlqExpertsMethod
from glq.vllm_integration.names import JOINED

_OF_AN_EXPERT = re.compile(r"(\.mlp\.experts\.)(?=\d+\.)")


class GlqGptOssForCausalLM(GptOssForCausalLM):
    """vLLM's, that finds an expert's tensors where vLLM 0.32 has experts."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights((_OF_AN_EXPERT.sub(r"\1routed_experts.", name), w) for name, w in weights)


class GptOssMethod(GlqExpertsMethod):
    """The experts of a layer of gpt-oss."""

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        super().create_weights(layer, *args, **options)
        for expert in range(self.moe.num_logical_experts):
            matrices = nn.Module()
            for stem, name in JOINED.items():
                tensors = nn.Module()
                for key in ("codes", "scale", "signs"):
                    param: Any = nn.Parameter(torch.empty(0), requires_grad=False)
                    param.weight_loader = _PassedOn(getattr(layer, f"{stem}_{key}"), stem, expert)
                    tensors.register_parameter(key, param)
                matrices.add_module(name, tensors)
            layer.add_module(str(expert), matrices)

    def process_weights_after_loading(self, layer: Any) -> None:
        for expert in range(self.moe.num_logical_experts):
            delattr(layer, str(expert))
        super().process_weights_after_loading(layer)


@dataclass(frozen=True)
class _PassedOn:
    """Copies a tensor of one expert into what all have together."""

    param: Any
    shard: str
    expert: int

    def __call__(self, _: Any, loaded_weight: Tensor) -> None:
        loader: ExpertsLoader = self.param.weight_loader
        loader(self.param, loaded_weight, f"expert {self.expert}", self.shard, self.expert)
