"""Rounding a matrix to codes so that its outputs, not its entries, change least: block LDLQ.

The objective is tr((W − Ŵ) H (W − Ŵ)ᵀ), H = E[x xᵀ]. Columns are rounded in blocks of two, and each block is moved
first by what the errors of the blocks before it make best for it (LDLQ of QuIP, arXiv:2307.13304; the same as GPTQ,
arXiv:2210.17323). A codec says only how to round a group of weights.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from glq.codecs import Codec
from glq.codecs.packing import STRIP, TILE_COLS, tile_rows

BLOCK = 2  # columns of a strip
PANEL = TILE_COLS
_AT_ONCE = 2**22  # elements that a step of preparing a matrix copies
_WITH_ENDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what torch.aminmax takes
_ROWS = 8192  # rows, on a GPU: fewer would change which product it takes, and so the last bit


@dataclass(frozen=True)
class Rounded:
    """codes [row tiles, padded in / 2, 8] int64; values [out, in] fp32 = decode(codes); scale [out] fp32."""

    codes: Tensor
    values: Tensor
    scale: Tensor


def factor(h: Tensor, damping: float) -> Tensor:
    """The factor of `damped_factor` alone."""
    return damped_factor(h, damping)[0]


def damped_factor(h: Tensor, damping: float) -> tuple[Tensor, float]:
    """M upper triangular with M·Mᵀ = h + λI, and the damping that it took.

    h [in, in] symmetric, positive semi-definite; λ = damping · mean(diag h), made ten times larger as often as the
    factorization fails. A zero or non-finite h (a layer that calibration never reached) counts as the identity.
    Returns [in, in] fp64.
    """
    flipped = _flipped(h)
    mean = flipped.diagonal().mean()
    if not all_finite(h) or mean <= 0:
        return torch.eye(h.shape[0], dtype=torch.float64, device=h.device), damping
    added, steps = 0.0, list[Tensor]()
    while True:
        steps.append((damping - added) * mean)
        for step in steps:  # one after the other: rounded like this since the first version
            flipped.diagonal().add_(step)
        failed = torch.zeros((), dtype=torch.int32, device=h.device)
        torch.linalg.cholesky_ex(flipped, out=(flipped, failed))  # in place: these matrices are what memory goes to
        if not failed:
            _reverse(flipped.mT.view(-1))
            return flipped, damping
        added, damping = damping, 10 * damping
        flipped = _flipped(h)


def _flipped(h: Tensor) -> Tensor:
    """h with rows and columns in reverse, fp64, a column contiguous as LAPACK has it."""
    flipped = torch.empty(h.shape, dtype=torch.float64, device=h.device).mT
    for start in range(0, len(h), _chunk(h)):
        rows = h[start : start + _chunk(h)]
        flipped[len(h) - start - len(rows) : len(h) - start] = rows.flip(0, 1)
    return flipped


def _reverse(flat: Tensor) -> None:
    """Reverse a vector in place, without a second one."""
    half, size = len(flat) // 2, len(flat)
    for start in range(0, half, _AT_ONCE):
        end = min(start + _AT_ONCE, half)
        front, back = flat[start:end], flat[size - end : size - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, found a piece at a time."""
    rows = max(1, _AT_ONCE * len(x) // x.numel()) if x.numel() and x.ndim else 1
    return all(bool(torch.isfinite(_ends(part)).all()) for part in (x.split(rows) if x.ndim else [x]))


def _ends(x: Tensor) -> Tensor:
    """The least and the greatest value, or NaN if there is one: found in a pass that makes no copy."""
    return torch.stack(torch.aminmax(x)) if x.numel() and x.dtype in _WITH_ENDS else x


def _chunk(h: Tensor) -> int:
    """Rows of a matrix to treat at once: on a CPU few, for little memory, which changes no bit there."""
    return max(64, _AT_ONCE // h.shape[1]) if h.device.type == "cpu" else _ROWS


def feedback(m: Tensor) -> Tensor:
    """M with each block of columns divided by its diagonal block: the unit factor N of M·Mᵀ = N·D·Nᵀ, fp32."""
    size = m.shape[0]
    if odd := size % BLOCK:
        m = pad(m, (0, odd, 0, odd))
        m[-1, -1] = 1
    index = torch.arange(m.shape[0], device=m.device).view(-1, BLOCK)
    diagonal = m[index[:, :, None], index[:, None, :]]  # [blocks, 2, 2]
    unit = torch.empty(size, size, device=m.device)
    for start in range(0, size, _chunk(m)):
        rows = m[start : min(start + _chunk(m), size)]
        columns = rows.view(len(rows), -1, BLOCK).transpose(0, 1)  # [blocks, rows, 2]
        done = torch.linalg.solve_triangular(diagonal, columns, upper=True, left=False)
        unit[start : start + len(rows)] = done.transpose(0, 1).reshape(len(rows), -1)[:, :size]
    return unit


def solve(m: Tensor, b: Tensor) -> Tensor:
    """b · (M·Mᵀ)⁻¹ for b [rows, in], M from `factor`; in b's dtype."""
    y = torch.linalg.solve_triangular(m.T, b.to(m.dtype), upper=False, left=False)
    return torch.linalg.solve_triangular(m, y, upper=True, left=False).to(b.dtype)


def round_matrix(w: Tensor, h: Tensor, n: Tensor, codec: Codec, panels: "PanelRounder") -> Rounded:
    """Round w [out, in] fp32 (rotated) under h [in, in] in the same basis; n is `feedback(factor(h, damping))`.

    A row is scaled to unit variance for the codec, and its scale is fitted again by least squares under h at the end.
    A zero row gets scale 0. Deterministic on one device.
    """
    scale = w.square().mean(1).sqrt()
    codes, values = ldlq(w / torch.where(scale > 0, scale, 1.0)[:, None], n, codec, panels)  # kept by ldlq alone
    return Rounded(codes, values, refit(w, values, h, scale))


def ldlq(w: Tensor, n: Tensor, codec: Codec, round_panel: "PanelRounder") -> tuple[Tensor, Tensor]:
    """Block LDLQ of w [out, in] fp32 with rows of unit variance; n [in, in] from `feedback`.

    Returns codes [row tiles, padded in / 2, 8] int64 and their values [out, in] fp32. Rows and columns are filled up
    with zeros to whole tiles.
    """
    rows, cols = w.shape
    extra_rows, extra_cols = -rows % tile_rows(codec.group), -cols % TILE_COLS
    if extra_rows or extra_cols:
        w, n = pad(w, (0, extra_cols, 0, extra_rows)), pad(n, (0, extra_cols, 0, extra_cols))
    target = w.T.contiguous()  # [in, out]: a block of columns is contiguous
    del w
    values, error = torch.empty_like(target), torch.empty_like(target)
    codes = []
    for start in range(0, target.shape[0], PANEL):
        panel = slice(start, start + PANEL)
        moved = torch.addmm(target[panel], n[:start, panel].T, error[:start])
        code, values[panel] = round_panel(codec, moved, target[panel], n[panel, panel])
        error[panel] = target[panel] - values[panel]
        codes.append(code)
    return torch.cat(codes, 1), values.T[:rows, :cols]


class PanelRounder(Protocol):
    """Rounds PANEL columns: moved, target [PANEL, out] and n [PANEL, PANEL] fp32 → codes, values.

    target holds the columns themselves, moved what the errors of the panels before make best for them. Returned are
    codes [row tiles, PANEL / 2, 8] int64 and values [PANEL, out] fp32, which the next call may overwrite.
    """

    def __call__(self, codec: Codec, moved: Tensor, target: Tensor, n: Tensor) -> tuple[Tensor, Tensor]: ...


def round_panel(codec: Codec, moved: Tensor, target: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The plain PanelRounder; overwrites `moved`."""
    values, codes = torch.empty_like(target), []
    for i in range(0, PANEL, BLOCK):
        block, rest = slice(i, i + BLOCK), slice(i + BLOCK, PANEL)
        code, rounded = codec.round(_strips(moved[block], codec.group))
        values[block] = _columns(rounded)
        moved[rest].addmm_(n[block, rest].T, target[block] - values[block])
        codes.append(code)
    return torch.stack(codes, 1), values


class GraphedPanelRounder:
    """`round_panel` as a CUDA graph, one a shape: its thousands of small kernels cost a launch each otherwise.

    For one device. capturing: held while a graph is captured, which no two threads may do at once.
    """

    def __init__(self, capturing: AbstractContextManager[object] | None = None) -> None:
        self._graphs: dict[tuple[str, torch.Size], _Graph] = {}
        self._capturing = capturing or nullcontext()

    def __call__(self, codec: Codec, moved: Tensor, target: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        key = (codec.name, moved.shape)
        if key not in self._graphs:
            with self._capturing:
                self._graphs[key] = _Graph(codec, moved, target, n)
        return self._graphs[key].replay(moved, target, n)


class _Graph:
    def __init__(self, codec: Codec, *inputs: Tensor) -> None:
        self._inputs = [t.contiguous().clone() for t in inputs]
        device = inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            round_panel(codec, *self._inputs)  # fills the caches of constant tensors, which capture must not
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for capture is one of the first device that captured; other threads may go on meanwhile
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = round_panel(codec, *self._inputs)

    def replay(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        codes, values = self._outputs
        return codes.clone(), values


def _strips(columns: Tensor, group: int) -> Tensor:
    """Two columns [2, out] → strips [row tiles, 8, group], as packing.to_strips orders them.

    The components are far apart in memory: E8 works on one after the other.
    """
    split = columns.view(BLOCK, -1, group // BLOCK, STRIP).permute(2, 0, 1, 3)  # [i, column, tile, g]
    return split.reshape(group, -1, STRIP).permute(1, 2, 0)


def _columns(strips: Tensor) -> Tensor:
    """Inverse of `_strips`: [row tiles, 8, group] → [2, out]."""
    tiles, _, group = strips.shape
    split = strips.permute(2, 0, 1).reshape(group // BLOCK, BLOCK, tiles, STRIP)
    return split.permute(1, 2, 0, 3).reshape(BLOCK, -1)


def refit(w: Tensor, values: Tensor, h: Tensor, fallback: Tensor) -> Tensor:
    """The row scales s that make tr((w − s·values) h (w − s·values)ᵀ) least; `fallback` where that is undefined."""
    hv = values @ h.to(values.dtype)
    denominator = (hv * values).sum(1)
    scale = hv.mul_(w).sum(1) / torch.where(denominator > 0, denominator, 1.0)
    return torch.where((denominator > 0) & (scale > 0) & (fallback > 0), scale, fallback)


def objective(w: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    """tr((w − rounded) h (w − rounded)ᵀ) / tr(w h wᵀ), a scalar: the share of the output's energy that is lost."""
    return energy(w - rounded, h) / energy(w, h)


def energy(w: Tensor, h: Tensor) -> Tensor:
    """tr(w h wᵀ), a scalar: of what w [out, in] gives for inputs with the second moments h."""
    return (w @ h).mul_(w).sum()
