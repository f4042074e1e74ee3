"""Attention over a paged E8 cache on an NVIDIA GPU, one query a sequence: launches kv/attend.cu."""

import struct
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError
from glq.kv.cuda_tables import FILES, device_tables
from glq.kv.layout import PageLayout

HEAD_DIMS = (64, 80, 96, 128, 256)
_TILE = 16  # tokens
_MAX_SHARES = 256


@dataclass(frozen=True)
class Plan:
    """How attention is spread over the GPU. `group`: query heads of a kv head."""

    dtype: torch.dtype
    layout: PageLayout
    group: int
    warps: int  # of a block
    resident: int  # blocks on a multiprocessor
    shares: int  # blocks that a sequence's tokens are cut among

    @property
    def heads8(self) -> int:
        return ceil(self.group / 8)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: tables, q and its rotation; then the warps' sums."""
        tables = 5504 + 896 + 4096
        q = self.heads8 * (8 * self.layout.head_dim * 4 + ceil(self.layout.head_dim / 64) * 4 * 32 * 8)
        return max(tables + q, self.warps * self.sums * 128)

    @property
    def source(self) -> nvrtc.Source:
        macros = {
            "BF16": 0,
            "OUT_BF16": int(self.dtype == torch.bfloat16),
            "DIM": self.layout.head_dim,
            "KEY_BITS": self.layout.key_bits,
            "VALUE_BITS": self.layout.value_bits,
            "PAGE_TOKENS": self.layout.page_tokens,
            "HEADS8": self.heads8,
            "WARPS": self.warps,
            "RESIDENT": self.resident,
            "MAX_SHARES": _MAX_SHARES,
        }
        return nvrtc.Source((*FILES, "kv/attend.cu"), tuple(macros.items()))

    @property
    def sums(self) -> int:
        """Registers of a lane that hold them."""
        return self.heads8 * ceil(self.layout.head_dim / 64) * 16


def refusal(layout: PageLayout, heads: int, dtype: torch.dtype) -> str:
    """Why the kernel does not take these; "" if it does. heads: of queries."""
    if layout.head_dim not in HEAD_DIMS:
        return f"heads of {layout.head_dim} channels"
    if heads % layout.heads or heads // layout.heads > 16:
        return f"{heads} query heads for {layout.heads} kv heads"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} queries"
    return ""


def check_factors(factors: Tensor | None, layout: PageLayout, device: torch.device) -> None:
    """GlqError for what a kernel would read beyond, or take for other numbers."""
    if factors is None:
        return
    found = (factors.shape, factors.dtype, factors.device, factors.is_contiguous())
    if found != ((layout.head_dim,), torch.float32, device, True):
        raise GlqError(
            f"factors of keys are {layout.head_dim} contiguous float32 on {device}, found {tuple(factors.shape)} "
            f"{factors.dtype} on {factors.device}"
        )


def make_plan(
    dtype: torch.dtype, layout: PageLayout, group: int, sequences: int, most: int, gpu: nvrtc.Launcher
) -> Plan:
    """most: tokens that a sequence may have to look at."""
    plan = Plan(dtype, layout, group, 8, 2, 1)
    if plan.sums > 32:
        plan = replace(plan, warps=4)
    elif gpu.arch >= 120:  # whose code needs a few registers more
        plan = replace(plan, warps=4, resident=3)
    blocks, at_once, tiles = sequences * layout.heads, plan.resident * gpu.multiprocessors, ceil(most / _TILE)

    def time(shares: int) -> int:
        """In turns of a block's loop, of which its beginning and its end take about one."""
        return ceil(blocks * shares / at_once) * (ceil(tiles / (shares * plan.warps)) + 1)

    return replace(plan, shares=min(range(1, min(_MAX_SHARES, ceil(tiles / plan.warps)) + 1), key=time))


def attend(
    q: Tensor,
    pages: Tensor,
    layout: PageLayout,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    factors: Tensor | None,
    gpu: nvrtc.Launcher,
    plan: Plan | None = None,
) -> Tensor:
    """As attend_reference of glq.kv.layout."""
    sequences, heads, dim = q.shape
    group = heads // layout.heads
    reason = refusal(layout, heads, q.dtype)
    if reason:
        raise GlqError(f"the attention kernel of the KV cache does not take {reason}")
    if q.stride(2) != 1 or pages.stride(1) != 1 or page_table.stride(1) != 1 or pages.stride(0) % 16:
        raise GlqError("the attention kernel of the KV cache takes contiguous rows, and pages that begin at 16 bytes")
    check_factors(factors, layout, q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not sequences:
        return out
    if plan is None:
        most = page_table.shape[1] * layout.page_tokens
        plan = make_plan(q.dtype, layout, group, sequences, min(most, window + _TILE) if window else most, gpu)
    parts = torch.empty(sequences * heads * plan.shares * (dim + 2), dtype=torch.float32, device=q.device)
    tensors = (q, pages, page_table, lengths, device_tables(q.device), factors, parts)
    sizes = (
        _bits(scale),
        _bits(softcap or 0.0),
        window or 0,
        layout.heads,
        group,
        pages.stride(0),
        page_table.stride(0),
    )
    grid = (plan.shares, sequences * layout.heads)
    gpu.launch(plan.source, "attend", grid, 32 * plan.warps, plan.shared, *tensors, *sizes, *q.stride()[:2])
    gpu.launch(plan.source, "join_shares", (heads, sequences), 128, 0, parts, out, plan.shares, *out.stride()[:2])
    return out


def _bits(v: float) -> int:
    (bits,) = struct.unpack("i", struct.pack("f", v))
    return int(bits)
