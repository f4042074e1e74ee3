"""Layers of a model that hold an upstream matrix as it is stored: linear layers, embeddings, experts."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from glq.embedding import ScaledEmbedding
from glq.experts import INNER, Experts, part_names
from glq.upstream.format import Layout
from glq.upstream.matrix import Embedding, Matrix, Tables, are_halves, check_values, joined, matrix_of, without_idle
from glq.upstream.ops import multiply

_DTYPES = {"I16": torch.int16, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class UpstreamLayer(nn.Module):
    """Buffers with the names that the files have. They keep their types: a cast of the model leaves scales in fp32."""

    def __init__(self, layout: Layout, tables: Tables) -> None:
        super().__init__()
        self._layout, self._tables = layout, tables
        for ending, (dtype, shape, _) in layout.tensors.items():
            if ending != "bias":
                self.register_buffer(ending, torch.zeros(shape, dtype=_DTYPES[dtype]))

    def settle(self) -> None:
        """Check what was loaded, and drop what counts nothing. GlqError for values that cannot be."""
        tensors = dict(self.named_buffers(recurse=False))
        check_values(self._layout, tensors, self._tables)
        self._layout = without_idle(self._layout, tensors)
        used = {name for s in self._layout.stages for name in (s.codes, s.weight)} | {"SU", "SV", "Wscale", "tlut"}
        for name in tensors.keys() - used - {"_like"}:
            delattr(self, name)

    def _stored(self) -> Matrix | Embedding:
        return matrix_of(self._layout, cast(dict[str, Tensor], self._buffers), self._tables)

    def _apply(self, fn: Any, recurse: bool = True) -> "UpstreamLayer":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if name != "_like" and old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class UpstreamLinear(UpstreamLayer):
    """Drop-in for nn.Linear in inference: x [..., in] → [..., out], same dtype."""

    def __init__(self, layout: Layout, tables: Tables, rows: int, columns: int) -> None:
        super().__init__(layout, tables)
        self.in_features, self.out_features = columns, rows
        self._pair: tuple[UpstreamLinear, ...] = ()  # gate and up, if they were quantized as one
        self.bias: nn.Parameter | None = None
        if bias := layout.tensors.get("bias"):
            self.bias = nn.Parameter(torch.zeros(bias[1], dtype=_DTYPES[bias[0]]), requires_grad=False)

    @property
    def matrix(self) -> Matrix:
        """What is stored under this layer's name: its own matrix, or a half of a pair's."""
        return cast(Matrix, self._stored())

    def forward(self, x: Tensor) -> Tensor:
        if self._pair:
            y = self._half(multiply(x, joined(*(layer.matrix for layer in self._pair)), 2 * self.out_features), -1)
        else:
            y = multiply(x, self.matrix, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight_of(self) -> Tensor:
        """[out, in] fp32."""
        if self._pair:
            return self._half(_both(*self._pair), 0)
        return self.matrix.dequantize(self.out_features, self.in_features)

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """An nn.Linear with the same weight."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight_of().to(dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.data.to(dtype), requires_grad=False)
        return layer

    def _half(self, both: Tensor, dim: int) -> Tensor:
        return both.narrow(dim, 0 if self._pair[0] is self else self.out_features, self.out_features)

    def extra_repr(self) -> str:
        kinds = "+".join(stage.kind for stage in self._layout.stages)
        return f"in_features={self.in_features}, out_features={self.out_features}, upstream={kinds!r}"


def pair(gate: UpstreamLinear, up: UpstreamLinear) -> bool:
    """Let two layers know that they were quantized as one matrix, if they were."""
    if gate.out_features == up.out_features and are_halves(gate.matrix, up.matrix):
        gate._pair = up._pair = (gate, up)
    return bool(gate._pair)


def _both(gate: UpstreamLinear, up: UpstreamLinear) -> Tensor:
    return joined(gate.matrix, up.matrix).dequantize(2 * gate.out_features, gate.in_features)


class UpstreamEmbedding(UpstreamLayer):
    """Drop-in for nn.Embedding in inference: ids [...] → factor · rows [..., width]."""

    _like: Tensor  # nothing, in the dtype of the outputs

    def __init__(
        self, layout: Layout, tables: Tables, rows: int, width: int, factor: float, dtype: torch.dtype | None
    ) -> None:
        super().__init__(layout, tables)
        self.num_embeddings, self.embedding_dim, self.factor = rows, width, factor
        self.register_buffer("_like", torch.zeros(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embedding.rows(ids.flatten(), self.embedding_dim).view(*ids.shape, -1).to(self._like.dtype)
        return rows if self.factor == 1 else rows * self.factor

    @property
    def embedding(self) -> Embedding:
        return cast(Embedding, self._stored())

    def weight_of(self) -> Tensor:
        """[rows, width] fp32, without the factor."""
        return self.embedding.dequantize(self.num_embeddings, self.embedding_dim)

    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        """An nn.Embedding with the same weight, and the same factor on its outputs."""
        dense = ScaledEmbedding(self.num_embeddings, self.embedding_dim, device="meta")
        dense.factor = self.factor
        dense.weight = nn.Parameter(self.weight_of().to(dtype), requires_grad=False)
        return dense


class UpstreamExperts(Experts):
    """Experts whose matrices are layers of their own, under their numbers, as the files have them."""

    def __init__(
        self,
        original: Any,
        layouts: Mapping[tuple[int, str], Layout],
        shapes: Mapping[str, tuple[int, int, int]],
        leaves: Mapping[str, str],
        tables: Tables,
    ) -> None:
        """layouts: by the number of the expert and the part; shapes: experts, rows and columns of each part.

        leaves: what the files call each part.
        """
        super().__init__(original)
        self._leaves = dict(leaves)
        for expert in range(self.count):
            block = nn.Module()
            for part, (_, rows, columns) in shapes.items():
                block.add_module(leaves[part], UpstreamLinear(layouts[expert, part], tables, rows, columns))
            self.add_module(str(expert), block)

    def part(self, expert: int, name: str) -> UpstreamLinear:
        return cast(UpstreamLinear, self.get_submodule(f"{expert}.{self._leaves[name]}"))

    def outer(self, x: Tensor, experts: Tensor) -> Tensor:
        names = part_names(self.outer_name)
        return self._multiply(
            x, experts, experts.shape[1], [[self.part(e, n) for n in names] for e in range(self.count)]
        )

    def inner(self, x: Tensor, experts: Tensor) -> Tensor:
        return self._multiply(x, experts, 1, [[self.part(e, INNER)] for e in range(self.count)])

    def _multiply(self, x: Tensor, experts: Tensor, each: int, layers: list[list[UpstreamLinear]]) -> Tensor:
        y = x.new_zeros(experts.numel(), sum(layer.out_features for layer in layers[0]))
        for expert, parts in enumerate(layers):
            (pairs,) = torch.where(experts.flatten() == expert)
            if len(pairs):
                y[pairs] = _product(x[pairs // each], parts)
        return y

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The module this one stands for, its weights in `dtype`."""
        names = part_names(self.outer_name)
        outer = [_weights([self.part(e, n) for n in names]).to(dtype) for e in range(self.count)]
        inner = [self.part(e, INNER).weight_of().to(dtype) for e in range(self.count)]
        return self.restored(torch.stack(outer), torch.stack(inner))


def _product(x: Tensor, parts: list[UpstreamLinear]) -> Tensor:
    """What parts give side by side; those that are one matrix in one product."""
    if len(parts) == 2 and parts[0]._pair:
        return multiply(x, joined(parts[0].matrix, parts[1].matrix), 2 * parts[0].out_features)
    return torch.cat([part(x) for part in parts], -1)


def _weights(parts: list[UpstreamLinear]) -> Tensor:
    if len(parts) == 2 and parts[0]._pair:
        return _both(*parts)
    return torch.cat([part.weight_of() for part in parts])
