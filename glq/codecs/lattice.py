"""Nearest points of D4 cosets and of E8, in closed form (Conway & Sloane, Fast quantizing and decoding, 1982).

Vectors lie along dim 0 ([4, n] or [8, n]): every step is then one contiguous elementwise pass, several times
faster on a CPU than rows of 4 or 8.
"""

import torch
from torch import Tensor


def nearest_with_parity(x: Tensor, half: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest point of Zᵈ (or of (Z+½)ᵈ, if half), and the cost of moving to its other parity class.

    x [d, n] float, d even. Returns the point [d, n], its squared distance [n], its parity [n] (the sum of its
    coordinates modulo 2, 0.0 or 1.0), and what flipping the worst coordinate adds to the squared distance [n]. The
    point of the other class is `flip_worst(x, point, 1)`.
    """
    offset = 0.5 if half else 0.0
    point = (x - offset).round_().add_(offset)
    error = x - point
    parity = point.sum(0).remainder_(2)
    return point, error.square().sum(0), parity, 1 - 2 * error.abs_().amax(0)


def flip_worst(x: Tensor, point: Tensor, flip: Tensor) -> Tensor:
    """Where `flip` ([n] of 0.0 or 1.0), move the coordinate of point [d, n] farthest from x by one, towards x."""
    error = x - point
    # argmax is slow along dim 0; a bias far below any distance that matters makes the largest one unique
    bias = torch.arange(x.shape[0], 0, -1, device=x.device, dtype=x.dtype)[:, None] * 1e-6
    size = error.abs().add_(bias)
    worst = (size == size.amax(0)).to(x.dtype)
    return point.addcmul(worst.copysign_(error), flip)


def choose(flag: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """b where flag [n] is 1.0, a where it is 0.0; exact for multiples of ½. torch.where is slow on a broadcast flag."""
    return torch.addcmul(a, b - a, flag)


def nearest_e8(x: Tensor) -> Tensor:
    """Nearest point of E8 = D8 ∪ (D8 + ½) for each column of x [8, n] float; exact, [8, n] in x's dtype."""
    point, distance, parity, flip = nearest_with_parity(x, half=False)
    point_h, distance_h, parity_h, flip_h = nearest_with_parity(x, half=True)
    half = (distance_h.addcmul_(parity_h, flip_h) < distance.addcmul_(parity, flip)).to(x.dtype)
    return flip_worst(x, choose(half, point, point_h), choose(half, parity, parity_h))
