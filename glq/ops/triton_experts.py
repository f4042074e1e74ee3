"""y = x · W_eᵀ for pairs of a token and an expert with Triton, for every codec.

What triton_matmul.py says of waiting and of CUDA graphs holds here, too.
"""

import torch
import triton
from torch import Tensor

from glq.ops.pairs import segment_limit, sort_pairs
from glq.ops.triton_experts_kernel import experts_kernel
from glq.ops.triton_matmul import TYPES
from glq.ops.triton_rotate import rotate_apart
from glq.ops.triton_tables import decoder, decoding_table
from glq.packed import PackedExperts

_EACH = 32  # pairs up to which each is multiplied for itself, which needs no sorting; to be measured
_AT_ONCE = (16, 32, 64)  # pairs of an expert otherwise: the first that is twice the average


def matmul(x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int) -> Tensor:
    """As ops.experts."""
    pairs, experts = len(expert_of), weights.count
    at_once, values = 1, torch.float32
    order = by_expert = expert_of.contiguous()
    if pairs > _EACH:
        at_once, values = next((n for n in _AT_ONCE if n * experts >= 2 * pairs), _AT_ONCE[-1]), x.dtype
        order, by_expert = sort_pairs(expert_of, experts)
    y = x.new_zeros(pairs, weights.out_features)
    _, row_tiles, col_tiles, _ = weights.codes.shape
    with torch.cuda.device_of(x):
        rotated = rotate_apart(x.contiguous(), weights.signs, weights.block, col_tiles)
        experts_kernel[(row_tiles, segment_limit(pairs, experts, at_once))](
            weights.codes.contiguous().view(torch.uint32),
            *rotated,
            decoding_table(weights.codec, values, x.device),
            weights.scale,
            y,
            order,
            by_expert,
            weights.out_features,
            weights.in_features,
            experts,
            row_tiles,
            col_tiles,
            top_k,
            PAIRS=at_once,
            EXPERTS=triton.next_power_of_2(experts),
            DTYPE=TYPES[values],
            **decoder(weights.codec).constants,
            num_warps=4,
            num_stages=1,
        )
    return y
