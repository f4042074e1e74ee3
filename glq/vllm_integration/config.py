"""What vLLM asks about a glq checkpoint: the config, and which method each layer takes."""

from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from glq import __version__
from glq.checkpoint import summarize
from glq.config import QUANT_METHOD, GlqConfig, ModuleConfig, is_upstream
from glq.errors import GlqError
from glq.files import INDEX, SINGLE
from glq.vllm_integration import GPT_OSS, OWN_GPT_OSS, TESTED
from glq.vllm_integration.names import JOINED, members, of_tensors, renamed
from glq.vllm_integration.upstream import UpstreamVllmConfig

_log = getLogger("vllm.glq")


class GlqVllmConfig(QuantizationConfig):
    """A GlqConfig in the form that vLLM hands to each layer."""

    def __init__(self, glq: GlqConfig) -> None:
        super().__init__()
        self.glq = glq
        self.tied = False
        self.architecture, self.blocks = "", 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """From the quantization_config of config.json. GlqError for one that this glq does not read."""
        if not vllm.__version__.startswith(TESTED):
            _log.warning("glq %s is tested with vLLM %sx; this is %s", __version__, TESTED, vllm.__version__)
        if is_upstream(config):
            return UpstreamVllmConfig.from_config(config)
        return cls(GlqConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the files of a local checkpoint by their headers. GlqError names the first thing that is wrong."""
        text = None if hf_config is None else hf_config.get_text_config()
        self.tied = bool(getattr(text, "tie_word_embeddings", False))
        self.architecture = next(iter(getattr(text, "architectures", None) or ()), "")
        if text is not None and self.architecture == GPT_OSS:
            text.architectures = [OWN_GPT_OSS]
        self.blocks = getattr(text, "num_hidden_layers", 0)
        folder = Path(model_name)
        if (folder / INDEX).is_file() or (folder / SINGLE).is_file():  # not with load_format="dummy", and on the hub
            summarize(folder, self.glq)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that modules have in vLLM's model."""
        self.glq = replace(self.glq, modules=renamed(self.glq.modules, hf_to_vllm_mapper))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer; vLLM's own for one that is not quantized."""
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from glq.vllm_integration import kv, methods, passes

        prefix = of_tensors(self.architecture, prefix, self.blocks)
        if config := get_current_vllm_config_or_none():
            passes.install(config)  # the worker's config, which its compiler reads when the model is whole
            kv.check(config)
        if isinstance(layer, LinearBase):
            modules = self.modules_of(prefix)
            return methods.GlqLinearMethod(modules) if modules else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            if prefix in self.glq.modules:
                return methods.GlqEmbeddingMethod(prefix, self.glq.modules[prefix])
            return methods.GlqTiedHeadMethod() if self.tied and self.embeddings_of("") else None
        if isinstance(layer, VocabParallelEmbedding) and (name := self.embeddings_of(prefix)):
            return methods.GlqEmbeddingMethod(name, self.glq.modules[name])
        if isinstance(layer, RoutedExperts) and (experts := self.experts_of(layer, prefix)):
            return _experts_method(experts)(prefix, experts, layer.moe_config)
        return None

    def experts_of(self, layer: Any, prefix: str) -> dict[str, ModuleConfig]:
        """The quantized matrices of a layer's experts by vLLM's names, as GlqExpertsMethod; none if there are none."""
        names = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        if layer.moe_config.has_bias:
            names = JOINED
        found = {key: self.glq.modules.get(f"{prefix}.*.{name}") for key, name in names.items()}
        experts = {key: module for key, module in found.items() if module is not None}
        if not experts and any(name.startswith(f"{prefix}.") for name in self.glq.modules):
            raise GlqError(f"{prefix}: its experts are quantized, but not by the names {names}, which vLLM's model has")
        return experts

    def modules_of(self, prefix: str) -> dict[str, ModuleConfig]:
        """The quantized matrices that a linear layer is made of; none if it is not quantized."""
        modules = self.glq.modules
        return {name: modules[name] for name in members(prefix, modules, self.packed_modules_mapping)}

    def embeddings_of(self, prefix: str) -> str | None:
        """The quantized input embeddings, by vLLM's name for them, which some models leave out."""
        if prefix:
            return prefix if prefix in self.glq.modules else None
        ends = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
        return next((name for name in self.glq.modules if name.rpartition(".")[2] in ends), None)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def _experts_method(matrices: dict[str, ModuleConfig]) -> Any:
    if "w13" in matrices:
        from glq.vllm_integration.gpt_oss import GptOssMethod

        return GptOssMethod
    from glq.vllm_integration.experts import GlqExpertsMethod

    return GlqExpertsMethod
