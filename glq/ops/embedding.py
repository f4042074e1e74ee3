"""Rows of a packed matrix, for embeddings."""

import torch
from torch import Tensor

from glq.codecs import get_codec
from glq.codecs.packing import STRIP, tile_rows, unpack
from glq.custom_op import custom_op, register_fake
from glq.packed import unpack_signs
from glq.rotation import unrotate

ROWS_AT_ONCE = 256  # at once: a row is decoded with the tile that it lies in


@custom_op("embedding")
def embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    codec: str,
    in_features: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """ids [...] int → the rows [..., in] of the matrix in `dtype`; the rest as in PackedLinear."""
    parts = [
        embedding_reference(part, codes, scale, signs, codec, in_features, block)
        for part in ids.flatten().split(ROWS_AT_ONCE)
    ]
    return torch.cat(parts).to(dtype).view(*ids.shape, in_features)


@register_fake("embedding")
def _(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    codec: str,
    in_features: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty(*ids.shape, in_features, dtype=dtype)


def embedding_reference(
    ids: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, in_features: int, block: int
) -> Tensor:
    """What the op means, for ids [n], in fp32: decode the strips of each row's tile, and take the row out of them."""
    c = get_codec(codec)
    height = tile_rows(c.group)
    strips = c.decode(unpack(codes[ids // height], c.code_bits))  # [n, in / 2, 8, group]
    row = ids % height
    n = torch.arange(len(ids), device=ids.device)
    words = strips.unflatten(-1, (-1, 2))[n, :, row % STRIP, row // STRIP]  # [n, in / 2, 2]
    rotated = words.flatten(1)[:, :in_features] * scale[ids].float()[:, None]
    return unrotate(rotated, unpack_signs(signs, in_features), block)
