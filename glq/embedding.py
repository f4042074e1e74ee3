"""QuantEmbedding: input embeddings that stay packed, and the lm_head that is tied to them."""

import torch
from torch import Tensor, nn

from glq.errors import GlqError
from glq.ops.embedding import embedding
from glq.ops.matmul import matmul
from glq.packed import PACKED_DTYPES, PackedLinear, packed_shapes


class QuantEmbedding(nn.Module):
    """Drop-in for nn.Embedding in inference: ids [...] → factor · rows [..., in]; buffers as in PackedLinear."""

    codes: Tensor
    scale: Tensor
    signs: Tensor

    _like: Tensor  # nothing, in the dtype of the outputs: it follows the model's casts

    def __init__(
        self, rows: int, width: int, codec: str, block: int, factor: float = 1.0, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, width
        self.codec, self.block, self.factor = codec, block, factor
        for name, shape in packed_shapes(codec, rows, width).items():
            self.register_buffer(name, torch.zeros(shape, dtype=PACKED_DTYPES[name]))
        self.register_buffer("_like", torch.zeros(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        packed = (self.codes, self.scale, self.signs, self.codec, self.embedding_dim, self.block)
        rows = embedding(ids, *packed, self._like.dtype)
        return rows if self.factor == 1 else rows * self.factor

    @property
    def packed(self) -> PackedLinear:
        shape = (self.num_embeddings, self.embedding_dim)
        return PackedLinear(self.codec, *shape, self.block, self.codes, self.scale, self.signs)

    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        """An nn.Embedding with the same weight, and the same factor on its outputs."""
        dense = ScaledEmbedding(self.num_embeddings, self.embedding_dim, device="meta")
        dense.factor = self.factor
        dense.weight = nn.Parameter(self.packed.dequantize().to(dtype), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, codec={self.codec!r}"


class ScaledEmbedding(nn.Embedding):
    """Rows times a factor, as Gemma has them."""

    factor: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return rows if self.factor == 1 else rows * self.factor


class TiedHead(nn.Module):
    """The lm_head x [..., in] → [..., rows] of a QuantEmbedding; it has no tensors of its own."""

    def __init__(self, embeddings: QuantEmbedding) -> None:
        super().__init__()
        self._embeddings = (embeddings,)  # in a tuple: not a submodule, or its tensors would be saved twice
        self.in_features, self.out_features = embeddings.embedding_dim, embeddings.num_embeddings

    def forward(self, x: Tensor) -> Tensor:
        e = self._embeddings[0]
        return matmul(x, e.codes, e.scale, e.signs, e.codec, self.out_features, e.block)


def embedding_scale(module: nn.Module) -> float:
    """The factor that an embedding module puts on its rows. GlqError for one that does anything else to them."""
    if type(module) is nn.Embedding:
        return 1.0
    factor = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if isinstance(module, nn.Embedding) and isinstance(factor, float | int):
        return float(factor)
    raise GlqError(f"embeddings of type {type(module).__name__} cannot be quantized: leave --embeddings and --head out")
