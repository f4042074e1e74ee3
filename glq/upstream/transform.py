"""The orthonormal transform of either side of a matrix: blocks as wide as the binary digits of its size."""

import math

import torch
from torch import Tensor

from glq.rotation import hadamard


def block_sizes(size: int) -> list[int]:
    """The binary digits of a size, largest first: 2688 → 2048, 512, 128."""
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]


def transform(x: Tensor) -> Tensor:
    """B·x for each row of x [..., size] fp32, B = blockdiag(H_b / √b), H_b Sylvester's; symmetric, its own inverse.

    A butterfly of additions and one division: with it the weights are, bit for bit, those that were written.
    """
    return torch.cat([_butterfly(part) for part in x.split(block_sizes(x.shape[-1]), -1)], -1)


def fast_transform(x: Tensor) -> Tensor:
    """The same in a few small products, of other roundings: for inputs and outputs."""
    return torch.cat([hadamard(part, part.shape[-1]) for part in x.split(block_sizes(x.shape[-1]), -1)], -1)


def _butterfly(x: Tensor) -> Tensor:
    width, stride = x.shape[-1], 1
    y = x
    while stride < width:
        pairs = y.reshape(*x.shape[:-1], width // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = _interleaved(a + b, a - b)
        stride *= 2
    return y.reshape(x.shape) / torch.full((), math.sqrt(width), device=x.device)  # a GPU multiplies by 1 / a number


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    y = a.new_empty(*a.shape[:-1], 2, a.shape[-1])
    y[..., 0, :], y[..., 1, :] = a, b
    return y
