"""`import glq.hf_integration` lets transformers load glq checkpoints: AutoModelForCausalLM.from_pretrained(DIR)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from glq.checkpoint import summarize
from glq.config import QUANT_METHOD, GlqConfig
from glq.errors import GlqError
from glq.linear import QuantLinear


@register_quantization_config(QUANT_METHOD)
class GlqQuantizationConfig(QuantizationConfigMixin):
    """GlqConfig in the form that transformers keeps on `model.config.quantization_config`."""

    def __init__(self, **raw: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.glq = GlqConfig.from_dict({"quant_method": QUANT_METHOD} | raw)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):  # noqa: ANN206
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.glq.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class GlqHfQuantizer(HfQuantizer):
    """Puts QuantLinear where the checkpoint has packed tensors, after checking every one of them."""

    requires_calibration = True

    @property
    def _config(self) -> GlqConfig:
        return self.quantization_config.glq

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files:
            summarize(Path(checkpoint_files[0]).parent, self._config)
        for name, module in self._config.modules.items():
            linear = _linear(model, name)
            if (linear.in_features, linear.out_features) != (module.in_features, module.out_features):
                raise GlqError(
                    f"{name}: the checkpoint has a [{module.out_features}, {module.in_features}] weight, the model a "
                    f"[{linear.out_features}, {linear.in_features}] one: config.json was changed"
                )
            with torch.device("meta"):
                quantized = QuantLinear(
                    module.in_features,
                    module.out_features,
                    module.codec,
                    module.block,
                    bias=linear.bias is not None,
                    dtype=linear.weight.dtype,
                )
            model.set_submodule(name, quantized)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        empty = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
        if empty:
            raise GlqError(f"{len(empty)} tensors were not loaded, first {empty[0]}: the checkpoint is incomplete")
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, module.dequantize(dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise GlqError(f"{name} is not a linear layer of {type(model).__name__}: config.json is not this model's")
    return module
