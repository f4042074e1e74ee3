"""Rotation of the input side: random signs, then an orthonormal transform of blocks O_m ⊗ Hadamard_p.

A rotated weight is W·Rᵀ and a rotated input R·x, so W·x is unchanged, while outliers are spread over the
block and every weight comes close to N(0, 1) (QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456).
R = H·diag(signs). H is block-diagonal; a block of width m·p (m odd, p a power of two) is the Kronecker
product of O_m, the orthonormal discrete Hartley transform (one formula for every m, symmetric), and of the
Sylvester Hadamard matrix of size p. H is symmetric and orthonormal: it is its own inverse.
"""

import math
from functools import cache

import torch
from torch import Tensor

from glq.errors import GlqError

MIN_BLOCK = 512  # narrower blocks cost quality: docs/decisions.md, "Width of the rotation"
MAX_BLOCK = 2048  # wider ones gain nothing measurable and cost the kernels a pass
_FACTOR = 64  # Hadamard factors up to this size are applied as one small matmul


def block_width(in_features: int, shards: int = 1) -> int:
    """Width of the rotation's blocks for an input of `in_features` channels cut into `shards` equal parts.

    The widest divisor of a shard from MIN_BLOCK to MAX_BLOCK with the smallest odd factor; a shard that has
    none is one block. Raises GlqError where the shards would be unequal.
    """
    if in_features < 1 or shards < 1 or in_features % shards:
        raise GlqError(
            f"cannot cut {in_features} input channels into {shards} equal shards: choose a degree that divides them"
        )
    width = in_features // shards
    divisors = [d for d in range(MIN_BLOCK, min(width, MAX_BLOCK) + 1) if width % d == 0]
    return min(divisors, key=lambda d: (odd_part(d), -d), default=width)


def odd_part(n: int) -> int:
    """The largest odd divisor of n."""
    return n // (n & -n)


def random_signs(in_features: int, generator: torch.Generator) -> Tensor:
    """[in_features] fp32 of ±1, drawn on the CPU so that every device gets the same ones."""
    return torch.randint(0, 2, (in_features,), generator=generator).float() * 2 - 1


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """R·x for each row of x.

    x [..., in] floating point; signs [in] of ±1; block divides `in`. Returns x's shape and dtype. Cost per row:
    in·(m + log2 p) operations, never a product with an [in, in] matrix.
    """
    return hadamard(x * signs.to(x.dtype), block)


def unrotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """R⁻¹·x for each row of x: the inverse of `rotate`, with the same arguments."""
    return hadamard(x, block) * signs.to(x.dtype)


def hadamard(x: Tensor, block: int) -> Tensor:
    """H·x for each row of x [..., in], H of blocks O_m ⊗ Hadamard_p; symmetric and orthonormal."""
    m = odd_part(block)
    p = block // m
    y, inner = x, 1
    while inner < p:  # Hadamard_p = Hadamard_f ⊗ Hadamard_f' ⊗ …: one small matmul a factor, innermost first
        f = min(p // inner, _FACTOR)
        h = _sylvester(f, x.dtype, x.device)
        y = y.reshape(-1, f) @ h if inner == 1 else h @ y.reshape(-1, f, inner)
        inner *= f
    if m > 1:
        y = hartley(m, x.dtype, x.device) @ y.reshape(-1, m, p)
    return y.reshape(x.shape)


@cache
def _sylvester(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / math.sqrt(n)).to(device, dtype)


@cache
def hartley(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    i = torch.arange(m, dtype=torch.float64)
    angle = 2 * math.pi / m * (i[:, None] * i).remainder(m)
    return ((angle.cos() + angle.sin()) / math.sqrt(m)).to(device, dtype)
