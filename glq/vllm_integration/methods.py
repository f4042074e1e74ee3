"""How vLLM's layers keep packed weights and multiply by them."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from glq import nvrtc
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.ops.embedding import embedding
from glq.ops.prepare import prepare
from glq.vllm_integration import all_reduce
from glq.vllm_integration.parts import Loader, Part, Rank, codes_of, cut, dequantize, multiply, runs, vocabulary_part


class GlqLinearMethod(LinearMethodBase):
    """A linear layer of one or more packed matrices, `modules` by their names."""

    def __init__(self, modules: dict[str, ModuleConfig]) -> None:
        self.modules = modules

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Tensors for the checkpoint's. GlqError for a tensor-parallel size that does not fit."""
        rank = Rank(layer.tp_rank, layer.tp_size)
        parts = cut(self.modules, output_partition_sizes, input_size_per_partition, rank)
        _create(layer, ", ".join(self.modules), parts, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        if _finish(layer, "weight_packed"):
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = multiply(x, layer.weight_packed, layer.scale, layer.signs, layer.glq_runs)
        return y if bias is None else y + bias


class GlqEmbeddingMethod(QuantizeMethodBase):
    """Input embeddings or an lm_head, or both, as one packed matrix [vocabulary, width]."""

    def __init__(self, name: str, module: ModuleConfig) -> None:
        self.name, self.module = name, module

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """As in linear layers; vLLM pads the vocabulary, and a rank has an equal share of the padded one."""
        module, (rows,) = self.module, output_partition_sizes
        if (module.out_features, module.in_features) != (layer.org_vocab_size, input_size):
            raise GlqError(
                f"{self.name}: the checkpoint has a [{module.out_features}, {module.in_features}] weight, the model a "
                f"[{layer.org_vocab_size}, {input_size}] one: config.json was changed"
            )
        part = vocabulary_part(self.name, module, rows * layer.tp_size, Rank(layer.tp_rank, layer.tp_size))
        _create(layer, self.name, (part,), params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        if _finish(layer, "weight"):
            layer.quant_method = UnquantizedEmbeddingMethod()
            layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = multiply(x, layer.weight, layer.scale, layer.signs, layer.glq_runs)
        return y if bias is None else y + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        (run,) = layer.glq_runs
        codes, width = codes_of(layer.weight, run), self.module.in_features
        return embedding(input_, codes, layer.scale, layer.signs[0], run.codec, width, run.block, layer.params_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        raise GlqError(f"{self.name} is quantized, yet the model ties it to its embeddings: config.json was changed")


class GlqTiedHeadMethod(QuantizeMethodBase):
    """An lm_head that is the quantized embeddings: it has no tensors, and vLLM takes the embeddings for it."""

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        pass

    def apply(self, layer: Any, *_: Any, **__: Any) -> Tensor:
        raise GlqError("the lm_head was not tied to the quantized embeddings: glq does not know this model of vLLM")

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        return embed_tokens


def _create(layer: Any, name: str, parts: tuple[Part, ...], dtype: torch.dtype) -> None:
    """Register codes, scale and signs; with load_format="dummy" codes are random, for timing."""
    tensors = {
        "codes": torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8),
        "scale": torch.empty(sum(part.rows for part in parts), dtype=torch.float16),
        "signs": torch.zeros(len(parts), -(-parts[0].columns // 8), dtype=torch.uint8),
    }
    config = get_current_vllm_config()
    if all_reduce.wanted(config):
        all_reduce.give_inboxes(get_tp_group(), dtype)
    dummy = config.load_config.load_format == "dummy"
    if dummy:
        tensors["codes"].random_()
    for key, tensor in tensors.items():
        param: Any = nn.Parameter(tensor, requires_grad=False)
        param.weight_loader, param.glq_missing = Loader(key, parts), set() if dummy else set(range(len(parts)))
        layer.register_parameter(key, param)
    layer.glq_name, layer.glq_parts, layer.glq_dtype = name, parts, dtype
    layer.glq_tokens = config.scheduler_config.max_num_batched_tokens


def _finish(layer: Any, packed: str) -> bool:
    """Check what was loaded. On a CPU, for which there are no kernels: decode it, and say so.

    packed: the name that the codes take, under which vLLM's LoRA layers look for a layer's device.
    """
    if lost := [key for key in ("codes", "scale", "signs") if getattr(layer, key).glq_missing]:
        raise GlqError(f"{layer.glq_name}: vLLM has not loaded its {lost[0]}: it gives the model's tensors other names")
    if not torch.isfinite(layer.scale).all():
        raise GlqError(f"{layer.glq_name}: scales are NaN or infinite: the file is damaged, get it again")
    if decodes_once():
        weight = dequantize(layer.codes, layer.scale, layer.signs, layer.glq_parts, layer.glq_dtype)
        del layer.codes, layer.scale, layer.signs
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        return True
    layer.glq_runs = runs(layer.glq_parts, layer.signs)
    if layer.codes.is_cuda and nvrtc.available():
        nvrtc.gpu(layer.codes.device).arenas.graphs_in_turn = True  # of which vLLM captures a thousand
        for run in layer.glq_runs:
            rows, columns = run.end_row - run.first_row, layer.glq_parts[0].columns
            prepare(layer.codes.device, layer.glq_dtype, run.codec, rows, columns, run.block, layer.glq_tokens)
    setattr(layer, packed, layer.codes)
    del layer.codes
    return False


def decodes_once() -> bool:
    """Whether weights are decoded when they are loaded, and multiplied by as any others."""
    return bool(current_platform.is_cpu())
