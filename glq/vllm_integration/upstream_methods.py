"""How vLLM's layers keep upstream's matrices: packed on one GPU, else decoded once they are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from glq.errors import GlqError
from glq.upstream.format import Layout
from glq.upstream.matrix import Embedding, Matrix, are_halves, check_values, joined, matrix_of, without_idle
from glq.upstream.ops import upstream_matmul
from glq.upstream.reader import UpstreamCheckpoint, check_sizes, is_gate, other_half
from glq.vllm_integration import methods

_log = getLogger("vllm.glq")
_QKV = {"q": 0, "k": 1, "v": 2}


class Loaded:
    """Tensors of a layer's matrices as vLLM brings them: `matrix` makes one of a layout's, and forgets them.

    Parameters of the layer are empty, and have the names of tensors in files; what loads them keeps them here.
    """

    def __init__(self, checkpoint: UpstreamCheckpoint) -> None:
        if get_current_vllm_config().load_config.load_format == "dummy":
            raise GlqError("checkpoints of upstream glq cannot be served with random weights (load_format dummy)")
        self._checkpoint = checkpoint
        self._tensors: dict[Any, dict[str, Tensor]] = {}

    def expect(self, layer: Any, names: Sequence[str], prefix: str = "", loader: Any = None) -> None:
        """Register a parameter for each tensor that matrices of these names have in the files."""
        endings = {ending for name in names for ending in self._checkpoint.layouts[name].tensors}
        for ending in sorted(endings - {"bias"}):
            param: Any = nn.Parameter(torch.empty(0), requires_grad=False)
            param.weight_loader = loader(self, ending) if loader else LinearLoader(self, ending)
            param.glq_expects = ending
            layer.register_parameter(f"{prefix}{ending}", param)

    def forget(self, layer: Any) -> torch.device:
        """Drop these parameters. The device that they were on."""
        found = [name for name, p in layer.named_parameters(recurse=False) if hasattr(p, "glq_expects")]
        device = getattr(layer, found[0]).device
        for name in found:
            delattr(layer, name)
        return device

    def keep(self, key: Any, ending: str, tensor: Tensor) -> None:
        self._tensors.setdefault(key, {})[ending] = tensor.clone()

    def matrix(self, key: Any, name: str, device: torch.device) -> tuple[Layout, Matrix | Embedding]:
        """GlqError if tensors have not come, or cannot be."""
        layout, tensors = self._checkpoint.layouts[name], self._tensors.pop(key, {})
        if lost := layout.tensors.keys() - tensors.keys() - {"bias"}:
            raise GlqError(f"{name}: vLLM has not loaded its {min(lost)}: it gives the model's tensors other names")
        tensors = {ending: tensor.to(device) for ending, tensor in tensors.items()}
        check_values(layout, tensors, self._checkpoint.tables)
        return layout, matrix_of(without_idle(layout, tensors), tensors, self._checkpoint.tables)


@dataclass(frozen=True)
class LinearLoader:
    """What vLLM calls with (parameter, tensor, which output)."""

    loaded: Loaded
    ending: str

    def __call__(self, param: Any, loaded_weight: Tensor, shard: Any = None) -> None:
        key = _QKV.get(str(shard), 0 if shard is None else shard)
        self.loaded.keep(key, self.ending, loaded_weight)


@dataclass(frozen=True)
class ExpertsLoader:
    """What vLLM calls for each expert of a layer."""

    loaded: Loaded
    ending: str

    def __call__(
        self,
        param: Any,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        self.loaded.keep((expert_id, shard_id), self.ending, loaded_weight)
        return True if return_success else None


@dataclass(frozen=True)
class Product:
    """One product of a layer: the names of its tensors, what kinds of codes they are, and its rows."""

    su: str
    sv: str
    scale: str
    codes: tuple[str, ...]
    tables: tuple[str, ...]
    weights: tuple[str, ...]
    kinds: str
    rows: int


class UpstreamLinearMethod(LinearMethodBase):
    """A linear layer of one or more matrices, `names` in the files."""

    def __init__(self, checkpoint: UpstreamCheckpoint, names: list[str]) -> None:
        self.checkpoint, self.names = checkpoint, names

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
        """Places for the checkpoint's tensors. Rotations go over whole rows and columns: ranks cannot share codes."""
        if len(self.names) not in (1, len(output_partition_sizes)):
            raise GlqError(f"{', '.join(self.names)}: vLLM fuses these to {len(output_partition_sizes)} outputs")
        layer.glq_loaded, layer.glq_dtype = Loaded(self.checkpoint), params_dtype
        layer.glq_sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
        layer.glq_loaded.expect(layer, self.names)

    def process_weights_after_loading(self, layer: Any) -> None:
        loaded: Loaded = layer.glq_loaded
        device = loaded.forget(layer)
        matrices = [loaded.matrix(i, name, device) for i, name in enumerate(self.names)]
        rows = _rows(layer, len(self.names))
        for (layout, _), count in zip(matrices, rows, strict=True):
            check_sizes(layout, count, layer.glq_sizes[2])
        _zero_biases(layer, [layout for layout, _ in matrices], rows)
        found = [matrix for _, matrix in matrices if isinstance(matrix, Matrix)]
        found, rows = _pairs(self.names, found, rows)
        if methods.decodes_once() or layer.tp_size > 1:
            self._decode(layer, found, rows)
        else:
            layer.glq_products = tuple(
                _register(layer, i, matrix, n) for i, (matrix, n) in enumerate(zip(found, rows, strict=True))
            )
        del layer.glq_loaded

    def _decode(self, layer: Any, matrices: list[Matrix], rows: list[int]) -> None:
        """Weights of 16 bits, which vLLM's own method cuts for its ranks and multiplies by."""
        columns, partitions, whole, output = layer.glq_sizes
        if not methods.decodes_once():
            _log.warning("%s is decoded to 16 bits: ranks cannot share upstream glq's codes", self.names[0])
        layer.quant_method = UnquantizedLinearMethod()
        load = getattr(layer, "weight_loader_v2", layer.weight_loader)
        layer.quant_method.create_weights(
            layer, columns, partitions, whole, output, layer.glq_dtype, weight_loader=load
        )
        layer.weight.data = layer.weight.data.to(matrices[0].su.device)
        weights = [matrix.dequantize(n, whole).to(layer.glq_dtype) for matrix, n in zip(matrices, rows, strict=True)]
        if len(self.names) == 1:
            load(layer.weight, weights[0])
        else:
            shards = list(_QKV) if hasattr(layer, "total_num_kv_heads") else list(range(len(self.names)))
            each = torch.cat(weights).split(_rows(layer, len(self.names)))
            for shard, part in zip(shards, each, strict=True):
                load(layer.weight, part, shard)
        layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        done = [_multiply(layer, product, x) for product in layer.glq_products]
        y = done[0] if len(done) == 1 else torch.cat(done, -1)
        return y if bias is None else y + bias


class UpstreamEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Gemma's embeddings of each layer, decoded once they are loaded."""

    def __init__(self, checkpoint: UpstreamCheckpoint, name: str) -> None:
        super().__init__()
        self.checkpoint, self.name = checkpoint, name

    def create_weights(self, layer: Any, *args: Any, weight_loader: Any, **more: Any) -> None:
        super().create_weights(layer, *args, weight_loader=weight_loader, **more)
        layer.glq_loaded, layer.glq_load = Loaded(self.checkpoint), weight_loader
        layer.glq_loaded.expect(layer, [self.name])

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.glq_loaded.forget(layer)
        layout, matrix = layer.glq_loaded.matrix(0, self.name, device)
        rows, columns = layer.org_vocab_size, layer.embedding_dim
        check_sizes(layout, rows, columns)
        layer.glq_load(layer.weight, matrix.dequantize(rows, columns).to(layer.weight.dtype))
        del layer.glq_loaded, layer.glq_load
        super().process_weights_after_loading(layer)


class UpstreamExpertsMethod(UnquantizedFusedMoEMethod):
    """Experts, decoded once they are loaded; `names` in files by expert and vLLM's name for the matrix."""

    def __init__(self, checkpoint: UpstreamCheckpoint, names: Mapping[tuple[int, str], str], moe: Any) -> None:
        super().__init__(moe)
        self.checkpoint, self.names = checkpoint, names

    def create_weights(self, layer: Any, *args: Any, **more: Any) -> None:
        super().create_weights(layer, *args, **more)
        layer.glq_loaded = Loaded(self.checkpoint)
        for stem, keys in (("w13_", ("w1", "w3")), ("w2_", ("w2",))):
            own = [name for (_, key), name in self.names.items() if key in keys]
            layer.glq_loaded.expect(layer, own, stem, ExpertsLoader)

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.glq_loaded.forget(layer)
        inside, hidden = self.moe.intermediate_size_per_partition_unpadded * self.moe.tp_size, self.moe.hidden_dim
        for expert in sorted({e for e, _ in self.names}):
            own = {key: name for (e, key), name in self.names.items() if e == expert}
            made = {key: layer.glq_loaded.matrix((expert, key), name, device)[1] for key, name in own.items()}
            for key, weight in _expert_weights(made, inside, hidden).items():
                param = layer.w2_weight if key == "w2" else layer.w13_weight
                layer.weight_loader(param, weight.to(param.dtype), f"{own[key]}.weight", shard_id=key, expert_id=expert)
        del layer.glq_loaded
        super().process_weights_after_loading(layer)


def _expert_weights(made: Mapping[str, Any], inside: int, hidden: int) -> dict[str, Tensor]:
    """The weights of one expert, gate and up apart, even if they were quantized as one."""
    weights = {"w2": made["w2"].dequantize(hidden, inside)}
    if "w1" in made and are_halves(made["w1"], made["w3"]):
        weights["w1"], weights["w3"] = joined(made["w1"], made["w3"]).dequantize(2 * inside, hidden).chunk(2)
        return weights
    return weights | {key: made[key].dequantize(inside, hidden) for key in ("w1", "w3") if key in made}


def _rows(layer: Any, count: int) -> list[int]:
    """Of each of a layer's matrices, before ranks cut them."""
    _, partitions, _, output = layer.glq_sizes
    if count == 1:
        return [output]
    if hasattr(layer, "total_num_kv_heads"):
        size, value = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        heads, shared = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * size, shared * size, shared * value]
    return [rows * layer.tp_size for rows in partitions]


def _pairs(names: list[str], matrices: list[Matrix], rows: list[int]) -> tuple[list[Matrix], list[int]]:
    """Gate and up that were quantized as one, as one."""
    pair = len(names) == 2 and is_gate(names[0]) and other_half(names[0]) == names[1] and rows[0] == rows[1]
    if pair and are_halves(*matrices):
        return [joined(*matrices)], [2 * rows[0]]
    return matrices, rows


def _zero_biases(layer: Any, layouts: Sequence[Layout], rows: Sequence[int]) -> None:
    """Upstream does not save biases of quantized layers, and vLLM leaves what is not loaded as it was allocated."""
    bias, first = getattr(layer, "bias", None), 0
    if bias is None:
        return
    for layout, count in zip(layouts, rows, strict=True):
        if "bias" not in layout.tensors:
            bias.data[first * len(bias) // sum(rows) : (first + count) * len(bias) // sum(rows)].zero_()
            _log.warning("%s: upstream glq does not save biases of quantized layers, zeros are taken", layout.name)
        first += count


def _register(layer: Any, number: int, matrix: Matrix, rows: int) -> Product:
    """Give a layer the tensors of a matrix as parameters."""

    def keep(name: str, tensor: Tensor) -> str:
        full = f"glq_{number}_{name}"
        layer.register_parameter(full, nn.Parameter(tensor, requires_grad=False))
        return full

    parts = matrix.parts
    return Product(
        keep("su", matrix.su),
        keep("sv", matrix.sv),
        keep("scale", matrix.scale),
        tuple(keep(f"codes{i}", part.codes) for i, part in enumerate(parts)),
        tuple(keep(f"table{i}", part.table) for i, part in enumerate(parts)),
        tuple(keep(f"weight{i}", part.weight) for i, part in enumerate(parts) if part.weight is not None),
        ",".join(part.kind for part in parts),
        rows,
    )


def _multiply(layer: Any, product: Product, x: Tensor) -> Tensor:
    su, sv, scale = (getattr(layer, name) for name in (product.su, product.sv, product.scale))
    codes, tables, weights = (
        [getattr(layer, n) for n in ns] for ns in (product.codes, product.tables, product.weights)
    )
    return upstream_matmul(x, su, sv, scale, codes, tables, weights, product.kinds, product.rows)
