"""Nearest points of D4 cosets and of E8, in closed form (Conway & Sloane, Fast quantizing and decoding, 1982).

Vectors lie along dim 0 ([4, n] or [8, n]): every step is then one contiguous elementwise pass, several times
faster on a CPU than rows of 4 or 8.
"""

from functools import cache

import torch
from torch import Tensor

_BIAS = tuple(1e-6 * (8 - i) for i in range(8))


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """values as fp32 on the device, made once: a copy from the host has no place in a CUDA graph."""
    return torch.tensor(values, device=device)


def nearest_integers(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest points of Zᵈ (index 0 of dim 1) and of (Z+½)ᵈ (1), and the cost of moving to their other parity.

    x [d, n] float, d even. Returns the points [d, 2, n], their squared distances [2, n], their parities [2, n] (the sum
    of the coordinates modulo 2, 0.0 or 1.0), and what flipping the worst coordinate adds to the distance [2, n].
    """
    offset = constant((0.0, 0.5), x.device)[:, None]
    x = x[:, None]
    point = (x - offset).round_().add_(offset)
    error = x - point
    parity = point.sum(0).remainder_(2)
    return point, error.square().sum(0), parity, error.abs_().amax(0).mul_(-2).add_(1)


def flip_worst(x: Tensor, point: Tensor, flip: Tensor) -> Tensor:
    """Where `flip` ([n] of 0.0 or 1.0), move the coordinate of point [d, n] farthest from x by one, towards x."""
    error = x - point
    # argmax is slow along dim 0; a bias far below any distance that matters makes the largest one unique
    size = error.abs().add_(constant(_BIAS[: x.shape[0]], x.device)[:, None])
    worst = (size == size.amax(0)).to(x.dtype)
    return point.addcmul(worst.copysign_(error), flip)


def choose(flag: Tensor, pair: Tensor) -> Tensor:
    """pair[..., 1, :] where flag [n] is 1.0, pair[..., 0, :] where it is 0.0; exact for multiples of ½ of modest size.

    torch.where is slow on a broadcast flag.
    """
    first, second = pair.unbind(-2)
    return torch.addcmul(first, second - first, flag)


def nearest_e8(x: Tensor) -> Tensor:
    """Nearest point of E8 = D8 ∪ (D8 + ½) for each column of x [8, n] float; exact, [8, n] in x's dtype."""
    point, distance, parity, flip = nearest_integers(x)
    cost = distance.addcmul_(parity, flip)
    half = (cost[1] < cost[0]).to(x.dtype)
    return flip_worst(x, choose(half, point), choose(half, parity))
