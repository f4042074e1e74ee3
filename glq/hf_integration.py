"""`import glq.hf_integration` lets transformers load glq checkpoints: AutoModelForCausalLM.from_pretrained(DIR)."""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from glq.checkpoint import summarize
from glq.config import QUANT_METHOD, GlqConfig, ModuleConfig, is_upstream
from glq.embedding import QuantEmbedding, TiedHead, embedding_scale
from glq.errors import GlqError
from glq.fused import fuse
from glq.graphs import decode_in_graphs
from glq.hub import resolve
from glq.linear import QuantLinear
from glq.machine import pick_device
from glq.naming import Naming
from glq.placing import keep_from_initializing, place_experts
from glq.quant_experts import ExpertsPart, QuantExperts
from glq.upstream.format import UpstreamConfig
from glq.upstream.placing import UpstreamPlacing
from glq.upstream.placing import dequantize as dequantize_upstream

_SLOW = "glq has no kernels for CPUs, where packed weights are decoded at every step"  # `load` is not slow


@register_quantization_config(QUANT_METHOD)
class GlqQuantizationConfig(QuantizationConfigMixin):
    """GlqConfig, or upstream's, in the form that transformers keeps on `model.config.quantization_config`."""

    def __init__(self, **raw: Any) -> None:
        self.quant_method = QUANT_METHOD
        raw = {"quant_method": QUANT_METHOD} | raw
        self.upstream = UpstreamConfig.from_dict(raw) if is_upstream(raw) else None
        self.glq = GlqConfig.from_dict(raw) if self.upstream is None else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        if self.upstream is not None:
            return dict(self.upstream.raw)
        assert self.glq is not None
        return self.glq.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class GlqHfQuantizer(HfQuantizer):
    """Puts QuantLinear where the checkpoint has packed tensors, after checking every one of them."""

    requires_calibration = True
    _conversions: Sequence[Any] = ()
    _upstream: UpstreamPlacing | None = None

    @property
    def _config(self) -> GlqConfig:
        return self.quantization_config.glq

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.quantization_config.upstream is not None:
            folder = Path(checkpoint_files[0] if checkpoint_files else ".").parent
            self._upstream = UpstreamPlacing(model, folder, self.quantization_config.upstream)
            self._conversions = self._upstream.conversions
            return
        naming = Naming(model)  # not kept: the model has this quantizer, and would keep itself
        self._conversions = place_experts(model, self._config, naming)
        for entry, module in self._config.modules.items():
            if module.experts is not None:
                continue
            name = naming.target(f"{entry}.weight")[0].removesuffix(".weight")
            original = _replaceable(model, name)
            rows, cols = original.weight.shape
            if (cols, rows) != (module.in_features, module.out_features):
                raise GlqError(
                    f"{name}: the checkpoint has a [{module.out_features}, {module.in_features}] weight, the model a "
                    f"[{rows}, {cols}] one: config.json was changed"
                )
            with torch.device("meta"):
                quantized = _quantized(original, module)
            tied = isinstance(quantized, QuantEmbedding) and _tied_head(model, original)
            model.set_submodule(name, quantized)
            keep_from_initializing(model, name)
            if isinstance(quantized, QuantEmbedding) and tied:
                model.set_output_embeddings(TiedHead(quantized))
                model.all_tied_weights_keys = {}
                model._tied_weights_keys = {}
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            found = summarize(folder, self._config).tensors
            _refuse_missing(model, folder, Naming(model, self._conversions).origins(found).keys())

    def get_weight_conversions(self) -> list[Any]:
        """How transformers stacks the tensors of experts, which the files have one by one."""
        return list(self._conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self._upstream is not None:
            self._upstream.settle(model)
            self._upstream = None  # and the headers of all files with it
            return model
        for name, parameter in model.named_parameters():  # 5.19 leaves those that it renames as they were
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear | QuantEmbedding) and not torch.isfinite(module.scale).all():
                raise GlqError(f"{name}.scale holds NaN or infinite values: the file is damaged, get it again")
            if isinstance(module, ExpertsPart):
                module.check(name)
            elif isinstance(module, QuantExperts):
                module.join()
        fuse(model)
        decode_in_graphs(model)
        if not torch.cuda.is_available():
            warnings.warn(f"{_SLOW}: `model = model.dequantize()`, or glq.load, decodes them once", stacklevel=2)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dequantize_upstream(model, dtype or torch.float32)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear | QuantExperts):
                model.set_submodule(name, module.dequantize(dtype or torch.float32))
            if isinstance(module, QuantExperts):
                model._weight_conversions = None  # those of packed tensors: the model's own hold from here on
            if isinstance(module, QuantEmbedding):
                dequantize_embeddings(model, name, module, dtype or torch.float32)
        return model

    def is_serializable(self) -> bool:
        return self.quantization_config.upstream is None

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def dequantize_embeddings(model: PreTrainedModel, name: str, module: QuantEmbedding, dtype: torch.dtype) -> None:
    """Put plain embeddings in the place of packed ones, and a plain head in that of a tied one."""
    dense = module.dequantize(dtype)
    model.set_submodule(name, dense)
    if isinstance(model.get_output_embeddings(), TiedHead):
        head = nn.Linear(dense.embedding_dim, dense.num_embeddings, bias=False, device="meta")
        head.weight = dense.weight
        model.set_output_embeddings(head)


def _refuse_missing(model: PreTrainedModel, folder: Path, found: Collection[str]) -> None:
    """transformers fills tensors that a checkpoint lacks with random values; a glq checkpoint never lacks any."""
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in model.state_dict() if name not in found and name not in tied]
    if missing:
        raise GlqError(
            f"{folder} lacks {len(missing)} tensors of a {type(model).__name__}, first {missing[0]}: "
            "the checkpoint is incomplete, or was made for another model class"
        )


def load(
    model: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model that transformers loads, glq checkpoints included, ready for inference.

    dtype defaults to the checkpoint's own on a GPU (Gemma's activations overflow in fp16) and to fp32 on a CPU.
    On a CPU, for which there are no kernels, a glq checkpoint's layers are dequantized once: fast, but as large in
    memory as the original model. AutoModelForCausalLM.from_pretrained keeps them packed on every device.
    """
    where = pick_device(device) if isinstance(device, str) else device
    wanted = dtype or (torch.float32 if where.type == "cpu" else "auto")
    path = resolve(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _SLOW)
            loaded = AutoModelForCausalLM.from_pretrained(
                path, dtype=wanted, trust_remote_code=False, use_safetensors=True
            )
    except GlqError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise GlqError(f"{model} is not a model that transformers loads: {str(error).splitlines()[0]}") from error
    if where.type == "cpu" and isinstance(getattr(loaded, "hf_quantizer", None), GlqHfQuantizer):
        loaded = loaded.dequantize(loaded.dtype)
    return loaded.eval().to(where)


def _replaceable(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise GlqError(f"{name} is no linear layer or embedding of {type(model).__name__}: config.json is not its own")
    return module


def _quantized(original: nn.Linear | nn.Embedding, module: ModuleConfig) -> QuantLinear | QuantEmbedding:
    if isinstance(original, nn.Embedding):
        factor = embedding_scale(original)
        shape = (module.out_features, module.in_features)
        return QuantEmbedding(*shape, module.codec, module.block, factor, original.weight.dtype)
    return QuantLinear(
        module.in_features,
        module.out_features,
        module.codec,
        module.block,
        bias=original.bias is not None,
        dtype=original.weight.dtype,
    )


def _tied_head(model: PreTrainedModel, embeddings: nn.Module) -> bool:
    head = model.get_output_embeddings()
    tied = getattr(model, "all_tied_weights_keys", {})
    names = {id(module): name for name, module in model.named_modules()}
    ends = {f"{names.get(id(head))}.weight", f"{names.get(id(embeddings))}.weight"}
    return any({a, b} == ends for a, b in tied.items())
