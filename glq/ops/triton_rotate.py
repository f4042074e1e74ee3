"""Rotations of x with Triton: what is launched for each kind of product (triton_rotate_kernels.py has the kernels)."""

import math

import torch
import triton
from torch import Tensor

from glq.ops import triton_nvidia
from glq.ops.triton_rotate_kernels import rotate_kernel, rotate_power_kernel
from glq.ops.triton_tables import hadamard_factors

_WARPS = 8  # with 4, the fp32 products of 64 columns spill registers


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """R·x for each row of x, computed in fp32.

    x [..., in] fp32, fp16 or bf16; signs [⌈in / 8⌉] uint8, as in PackedLinear; block divides `in`. Returns x's shape
    and dtype, contiguous.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        with torch.cuda.device_of(x):
            _rotate(x.reshape(-1, x.shape[-1]).contiguous(), signs, block, y, (x.shape[-1], 1, 2))
    return y


def rotate_apart(x: Tensor, signs: Tensor, block: int, col_tiles: int) -> Tensor:
    """x [tokens, in] contiguous → [2, tokens, 32 · column tiles]: R·x's even columns, then its odd ones."""
    y = x.new_empty(2, len(x), 32 * col_tiles)
    _rotate(x, signs, block, y, (y.stride(1), y.stride(0), 1))
    return y


def rotate_to_words(x: Tensor, signs: Tensor, block: int, padded: int, size: int) -> Tensor:
    """x [in] contiguous → R·x [padded] fp32 in the order of words, `size` of a lane's side by side, then zeros."""
    cols = len(x)
    if block & (block - 1):
        y = x.new_zeros(padded, dtype=torch.float32)
        _rotate(x[None], signs, block, y, (padded, 1, 2), size)
        return y
    y = x.new_empty(padded, dtype=torch.float32)
    rotate_power_kernel[(cols // block,)](
        x,
        signs,
        y,
        cols,
        padded,
        BLOCK=block,
        LEVELS=block.bit_length() - 1,
        PAD=triton.next_power_of_2(padded - cols) if padded > cols else 0,
        SIZE=size,
        EARLY=triton_nvidia.starts_early(x.device),
        num_warps=_WARPS,
        **triton_nvidia.options(x.device),
    )
    return y


def _rotate(x: Tensor, signs: Tensor, block: int, y: Tensor, strides: tuple[int, int, int], size: int = 8) -> None:
    """x [tokens, in] contiguous → y, with the strides of a token, of a column's parity and of a pair of columns."""
    tokens, in_features = x.shape
    factors = hadamard_factors(block, x.device)
    rotate_kernel[(tokens, in_features // block, math.ceil(factors.a / 16))](
        x,
        signs,
        factors.left,
        factors.right,
        y,
        in_features,
        *strides,
        A=factors.a,
        P=factors.p,
        P_PAD=max(factors.p, 16),
        SIZE=size,
        num_warps=_WARPS,
        num_stages=1,
    )
