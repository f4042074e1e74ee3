"""Checkpoints of upstream glq in vLLM: which method each layer takes."""

from logging import getLogger
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from glq.config import QUANT_METHOD
from glq.errors import GlqError
from glq.hub import resolve
from glq.upstream.format import UpstreamConfig
from glq.upstream.reader import UpstreamCheckpoint
from glq.vllm_integration.names import members, renamed

_log = getLogger("vllm.glq")


class UpstreamVllmConfig(QuantizationConfig):
    """An upstream config in the form that vLLM hands to each layer.

    names: of the modules that are quantized, as vLLM calls them → as the files do.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint: UpstreamCheckpoint | None = None
        self.names: dict[str, str] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UpstreamVllmConfig":
        return cls(UpstreamConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of all files: they alone say what is quantized. A model on the hub is downloaded for it."""
        self.checkpoint = UpstreamCheckpoint(resolve(model_name), self.config)
        self.names = {name: name for name in self.checkpoint.layouts}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that modules have in vLLM's model."""
        self.names = renamed(self.names, hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; vLLM's own for one that is not quantized."""
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from glq.vllm_integration import kv
        from glq.vllm_integration import upstream_methods as methods

        if config := get_current_vllm_config_or_none():
            kv.check(config)
        if self.checkpoint is None:
            raise GlqError("vLLM did not say where the checkpoint is: glq does not know this version")
        if isinstance(layer, LinearBase):
            names = self.matrices_of(prefix)
            return methods.UpstreamLinearMethod(self.checkpoint, names) if names else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.names:
            return methods.UpstreamEmbeddingMethod(self.checkpoint, self.names[prefix])
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.names):
            _log.warning("%s: its experts are decoded when they are loaded, and take 16 bits of memory", prefix)
            return methods.UpstreamExpertsMethod(self.checkpoint, self.experts_of(layer, prefix), layer.moe_config)
        return None

    def matrices_of(self, prefix: str) -> list[str]:
        """The names in files of the matrices that a linear layer is made of; none if it is not quantized."""
        return [self.names[name] for name in members(prefix, self.names, self.packed_modules_mapping)]

    def experts_of(self, layer: Any, prefix: str) -> dict[tuple[int, str], str]:
        """The names in files of a layer's matrices, by the number of the expert and vLLM's name, w1, w2 or w3."""
        own = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        count = layer.moe_config.num_logical_experts
        wanted = {(e, key): f"{prefix}.{e}.{name}" for e in range(count) for key, name in own.items() if name}
        if lost := [name for name in wanted.values() if name not in self.names]:
            raise GlqError(f"{prefix}: its experts are quantized, but there is no {lost[0]}, which vLLM's model has")
        return {key: self.names[name] for key, name in wanted.items()}

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
