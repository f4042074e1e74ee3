"""Whether two ways to compute the same differ by rounding alone."""

import torch
from torch import Tensor


def close(x: Tensor, expected: Tensor) -> bool:
    """Of small operations: element by element."""
    if not expected.is_floating_point():
        return torch.equal(x, expected)
    error = 8 * torch.finfo(expected.dtype).eps
    finite = expected.float().masked_fill(~expected.isfinite(), 0)
    size = finite.square().mean().sqrt().item()
    return torch.allclose(x.float(), expected.float(), rtol=error, atol=error * size, equal_nan=True)


def close_products(y: Tensor, expected: Tensor) -> bool:
    """Of products whose x was rounded otherwise ahead of them: row by row.

    An op that makes x rounds once where PyTorch's calls round two or three times. Each element of y sums thousands of
    such differences: relative to its row these do not grow, but relative to an element that happens to be small they
    may be anything. Measured with 2048 columns, in fp16 and bf16, with and without outliers in x: a row is .5 to .8 eps
    of its norm away, an element up to 4 eps of its row's root mean square or its own size. Bounds are a few times that.
    A token with another one's x or norm fails the first; so do rows of a tile, whatever their share, the second.
    """
    eps = torch.finfo(expected.dtype).eps
    finite = expected.isfinite()
    if not torch.equal(y.isfinite(), finite):
        return False
    wide = expected.float().masked_fill(~finite, 0)
    apart = (y.float().masked_fill(~finite, 0) - wide).abs()
    rows = apart.norm(dim=-1) <= 4 * eps * wide.norm(dim=-1)
    elements = apart <= 8 * eps * wide.abs() + 16 * eps * wide.square().mean(-1, keepdim=True).sqrt()
    return bool(rows.all() and elements.all())
