"""The product over experts with very many pairs where CUDA C++ has none: W_e in 16 bits, then PyTorch's grouped one.

Nothing here depends on values of expert_of: which experts have pairs is known to the device alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from glq.codecs import get_codec
from glq.codecs.packing import tile_rows
from glq.ops.pairs import sort_pairs
from glq.packed import PackedExperts

_MANY = 128  # pairs an expert, on average, from which this is faster than the kernel for fewer; to be measured
_AT_ONCE = 1 << 27  # weights, 256 MiB of them


def applies(x: Tensor, weights: PackedExperts, pairs: int) -> bool:
    """Whether this is the way to multiply so many pairs.

    PyTorch's product waits for the CPU but for bf16 on Hopper, and wants rows of whole 16 bytes.
    """
    hopper = torch.cuda.get_device_capability(x.device) == (9, 0) and hasattr(torch, "_grouped_mm")
    whole = weights.in_features % 8 == 0 and weights.out_features % 8 == 0
    return hopper and whole and x.dtype == torch.bfloat16 and pairs >= _MANY * weights.count


def matmul(x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int) -> Tensor:
    """As ops.experts, where Triton compiles; some rows of all experts at a time."""
    from glq.ops.triton_rotate import rotate

    order, ends = sort_pairs(expert_of, weights.count)
    known = torch.arange(len(order), device=x.device)[:, None] < ends[-1]
    rows = rotate(x, weights.signs, weights.block)[order // top_k]
    y = x.new_empty(len(order), weights.out_features)
    for first, end, matrices in _parts(weights, x.dtype):
        product = torch._grouped_mm(rows, matrices.transpose(1, 2), offs=ends)
        y[:, first:end].index_copy_(0, order.long(), torch.where(known, product, 0))  # beyond ends it is anything
    return y


def _parts(weights: PackedExperts, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Rows first … end − 1 of every expert's matrix, in the rotated basis: [experts, end − first, in]."""
    from glq.ops.triton_matmul import dequantize

    height = tile_rows(get_codec(weights.codec).group)
    scale = torch.nn.functional.pad(weights.scale, (0, -weights.out_features % height))
    tiles = max(1, _AT_ONCE // (height * weights.count * weights.in_features))
    for first in range(0, weights.codes.shape[1], tiles):
        codes = weights.codes[:, first : first + tiles].flatten(0, 1)
        rows = scale[:, first * height : (first + tiles) * height].reshape(-1)
        tall = dequantize(codes, rows, weights.codec, len(rows), weights.in_features, dtype)
        end = min((first + tiles) * height, weights.out_features)
        yield first * height, end, tall.view(weights.count, -1, weights.in_features)[:, : end - first * height]
