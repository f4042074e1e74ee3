"""Rounding a matrix to codes so that its outputs, not its entries, change least: block LDLQ.

The objective is tr((W − Ŵ) H (W − Ŵ)ᵀ), H = E[x xᵀ]. Columns are rounded in blocks of two, and each block is moved
first by what the errors of the blocks before it make best for it (LDLQ of QuIP, arXiv:2307.13304; the same as GPTQ,
arXiv:2210.17323). A codec says only how to round a group of weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from glq.codecs import Codec
from glq.codecs.packing import TILE_COLS, TILE_ROWS, from_groups

BLOCK = 2  # columns of a group
_PANEL = TILE_COLS


@dataclass(frozen=True)
class Rounded:
    """codes [row tiles, 8, padded in / 2] int64; values [out, in] fp32 = decode(codes); scale [out] fp32."""

    codes: Tensor
    values: Tensor
    scale: Tensor


def factor(h: Tensor, damping: float) -> Tensor:
    """M upper triangular with M·Mᵀ = h + λI.

    h [in, in] symmetric, positive semi-definite; λ = damping · mean(diag h), made ten times larger as often as the
    factorization fails. A zero or non-finite h (a layer that calibration never reached) counts as the identity.
    Returns [in, in] fp64.
    """
    h = h.double()
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    mean = h.diagonal().mean()
    if not torch.isfinite(h).all() or mean <= 0:
        return eye
    while True:
        lower, failed = torch.linalg.cholesky_ex((h + damping * mean * eye).flip(0, 1))
        if not failed:
            return lower.flip(0, 1)
        damping *= 10


def feedback(m: Tensor) -> Tensor:
    """M with each block of columns divided by its diagonal block: the unit factor N of M·Mᵀ = N·D·Nᵀ, fp32."""
    size = m.shape[0]
    if odd := size % BLOCK:
        m = pad(m, (0, odd, 0, odd))
        m[-1, -1] = 1
    index = torch.arange(m.shape[0], device=m.device).view(-1, BLOCK)
    diagonal = m[index[:, :, None], index[:, None, :]]  # [blocks, 2, 2]
    columns = m.view(m.shape[0], -1, BLOCK).transpose(0, 1)  # [blocks, in, 2]
    unit = torch.linalg.solve_triangular(diagonal, columns, upper=True, left=False)
    return unit.transpose(0, 1).reshape_as(m)[:size, :size].float()


def solve(m: Tensor, b: Tensor) -> Tensor:
    """b · (M·Mᵀ)⁻¹ for b [rows, in], M from `factor`; in b's dtype."""
    y = torch.linalg.solve_triangular(m.T, b.to(m.dtype), upper=False, left=False)
    return torch.linalg.solve_triangular(m, y, upper=True, left=False).to(b.dtype)


def round_matrix(w: Tensor, h: Tensor, m: Tensor, codec: Codec) -> Rounded:
    """Round w [out, in] fp32 (rotated) under h [in, in] in the same basis; m is `factor(h, damping)`.

    A row is scaled to unit variance for the codec, and its scale is fitted again by least squares under h at the end.
    A zero row gets scale 0. Deterministic on one device.
    """
    scale = w.square().mean(1).sqrt()
    unit = w / torch.where(scale > 0, scale, 1.0)[:, None]
    codes, values = ldlq(unit, feedback(m), codec)
    return Rounded(codes, values, refit(w, values, h, scale))


def ldlq(w: Tensor, n: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Block LDLQ of w [out, in] fp32 with rows of unit variance; n [in, in] from `feedback`.

    Returns codes [row tiles, 8, padded in / 2] int64 and their values [out, in] fp32. Rows and columns are filled up
    with zeros to whole tiles.
    """
    rows, cols = w.shape
    extra_rows, extra_cols = -rows % TILE_ROWS, -cols % TILE_COLS
    target = pad(w, (0, extra_cols, 0, extra_rows)).T.contiguous()  # [in, out]: a block of columns is contiguous
    n = pad(n, (0, extra_cols, 0, extra_cols))
    error, values = torch.zeros_like(target), torch.empty_like(target)
    codes = []
    for start in range(0, target.shape[0], _PANEL):
        panel = slice(start, start + _PANEL)
        moved = torch.addmm(target[panel], n[:start, panel].T, error[:start])
        for i in range(0, _PANEL, BLOCK):
            block = slice(i, i + BLOCK)
            code, rounded = codec.round(_groups(moved[block]))
            here = slice(start + i, start + i + BLOCK)
            values[here] = _columns(rounded, target.shape[1])
            error[here] = target[here] - values[here]
            rest = n[here, start + i + BLOCK : start + _PANEL]
            moved[i + BLOCK :].addmm_(rest.T, error[here])
            codes.append(code)
    return torch.stack(codes, -1).view(-1, 8, len(codes)), values.T[:rows, :cols]


def _groups(columns: Tensor) -> Tensor:
    """Two columns [2, out] → [out / 4, 8] groups of 4 rows × 2 columns, as packing.to_groups orders them."""
    return columns.view(BLOCK, -1, 4, 8).permute(2, 0, 1, 3).reshape(8, -1).T


def _columns(groups: Tensor, rows: int) -> Tensor:
    """Inverse of `_groups`: [out / 4, 8] → [2, out]."""
    return groups.T.reshape(4, BLOCK, rows // TILE_ROWS, 8).permute(1, 2, 0, 3).reshape(BLOCK, rows)


def refit(w: Tensor, values: Tensor, h: Tensor, fallback: Tensor) -> Tensor:
    """The row scales s that make tr((w − s·values) h (w − s·values)ᵀ) least; `fallback` where that is undefined."""
    hv = values @ h.to(values.dtype)
    denominator = (hv * values).sum(1)
    scale = (hv * w).sum(1) / torch.where(denominator > 0, denominator, 1.0)
    return torch.where((denominator > 0) & (scale > 0) & (fallback > 0), scale, fallback)


def objective(w: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    """tr((w − rounded) h (w − rounded)ᵀ) / tr(w h wᵀ), a scalar: the share of the output's energy that is lost."""
    e = w - rounded
    return ((e @ h) * e).sum() / ((w @ h) * w).sum()
