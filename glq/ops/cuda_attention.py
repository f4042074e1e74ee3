"""Attention of a few queries over many keys on an NVIDIA GPU: launches ops/attention.cu."""

import struct
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError

_WARPS = 8
_UNCUT = 2  # turns of a block's loop that cost less than a second launch
_MASKS = {None: 0, torch.bool: 1, torch.float16: 2, torch.bfloat16: 2, torch.float32: 3}


@dataclass(frozen=True)
class Plan:
    """How attention is spread over the GPU."""

    dtype: torch.dtype
    dim: int
    rows: int  # of queries in a block
    mask: torch.dtype | None
    mask_rows: int
    blocks: int
    run: int  # keys of a block

    @property
    def lanes(self) -> int:
        """Of a key."""
        return _power_of_two(self.dim // 8)

    @property
    def depth(self) -> int:
        """Keys that a lane has under way: registers are what limits them."""
        return 2 if self.rows > 4 else 4

    @property
    def source(self) -> nvrtc.Source:
        macros = {
            "BF16": int(self.dtype == torch.bfloat16),
            "DIM": self.dim,
            "LANES": self.lanes,
            "ROWS": self.rows,
            "WARPS": _WARPS,
            "DEPTH": self.depth,
            "MASK": _MASKS[self.mask],
            "MASK_ROWS": self.mask_rows,
        }
        return nvrtc.Source(("ops/ptx.cuh", "ops/attention.cu"), tuple(macros.items()))


def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Why the kernel does not take these; "" if it does. Shapes as in attend."""
    dim = q.shape[-1]
    if any(t.ndim != 4 for t in (q, k, v)) or k.shape[:3] != v.shape[:3] or len(q) != len(k) or 0 in q.shape + k.shape:
        return "queries, keys and values do not belong together"
    if not dim == k.shape[3] == v.shape[3] or dim % 8 or dim > 256 or q.shape[1] % k.shape[1]:
        return f"heads of {dim}, or their number"
    if q.dtype not in (torch.float16, torch.bfloat16) or {k.dtype, v.dtype} != {q.dtype}:
        return f"{q.dtype} queries with {k.dtype} keys"
    if mask is not None and (mask.dtype not in (torch.bool, torch.float32, q.dtype) or mask.ndim > 4):
        return f"a mask of {mask.dtype}"
    if any(t.stride(3) != 1 or any(s % 8 for s in t.stride()[:3]) or t.data_ptr() % 16 for t in (q, k, v)):
        return "rows that do not begin at 16 bytes"
    if max(s for t in (q, k, v) for s in t.stride()) >= 2**31:
        return "too large a cache"
    return ""


def make_plan(q: Tensor, k: Tensor, mask: Tensor | None, gpu: nvrtc.Launcher) -> Plan:
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    of_a_group = heads // kv_heads * queries
    rows = min(_power_of_two(of_a_group), 8 if dim <= 128 else 4)
    blocks = batch * kv_heads * ceil(of_a_group / rows)
    shared_mask = mask is None or all(size == 1 for size in mask.shape[-3:-1])
    kind = None if mask is None else mask.dtype
    plan = Plan(q.dtype, dim, rows, kind, 1 if shared_mask else rows, blocks, keys)
    turn = _WARPS * plan.depth * (32 // plan.lanes)
    if keys <= _UNCUT * turn:
        return plan
    most = max(1, 2 * gpu.multiprocessors // blocks)
    return replace(plan, run=turn * ceil(ceil(keys / turn) / most))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, gpu: nvrtc.Launcher
) -> None:
    """out = softmax(q Kᵀ · scale + mask) V, a few queries: q, out [batch, heads, queries, dim], fp16 or bf16;
    k, v [batch, kv_heads, keys, dim], of which each serves heads / kv_heads heads, one after the other;
    mask broadcast to [batch, heads, queries, keys]: bool, where True is seen, or what is added. A query that sees no
    key gets zeros."""
    reason = refusal(q, k, v, mask)
    if reason:
        raise GlqError(f"the attention kernel does not take {reason}")
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    plan = make_plan(q, k, mask, gpu)
    group, runs = heads // kv_heads, ceil(keys / plan.run)
    places = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
    count = plan.blocks * plan.rows * runs * (plan.dim + 2) if runs > 1 else 1
    parts = torch.empty(count, dtype=torch.float32, device=q.device)
    tensors = (q, k, v, q if mask is None else mask, out, parts)
    (bits,) = struct.unpack("i", struct.pack("f", scale))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *places, *out.stride()[:3])
    sizes = (bits, group, queries, keys, kv_heads, plan.run)
    gpu.launch(plan.source, "attend", (runs, plan.blocks), 32 * _WARPS, 0, *tensors, *sizes, *strides)
    if runs > 1:
        where = (group, queries, kv_heads, runs, *out.stride()[:3])
        gpu.launch(plan.source, "join_runs", (plan.rows, plan.blocks), plan.dim, 0, parts, out, *where)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
