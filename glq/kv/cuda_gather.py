"""Tokens out of a paged E8 cache on an NVIDIA GPU, as vectors: launches kv/gather.cu."""

from math import ceil

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError
from glq.kv.cuda_attend import HEAD_DIMS, check_factors
from glq.kv.cuda_tables import FILES, device_tables
from glq.kv.layout import PageLayout

_WARPS = 8
_RESIDENT = 4  # blocks on a multiprocessor


def source(dtype: torch.dtype, layout: PageLayout) -> nvrtc.Source:
    macros = {
        "BF16": int(dtype == torch.bfloat16),
        "DIM": layout.head_dim,
        "KEY_BITS": layout.key_bits,
        "VALUE_BITS": layout.value_bits,
        "PAGE_TOKENS": layout.page_tokens,
        "WARPS": _WARPS,
    }
    return nvrtc.Source((*FILES, "kv/gather.cu"), tuple(macros.items()))


def gather(
    pages: Tensor,
    layout: PageLayout,
    page_table_row: Tensor,
    tokens: int,
    dtype: torch.dtype,
    factors: Tensor | None,
    gpu: nvrtc.Launcher,
) -> tuple[Tensor, Tensor]:
    """As gather_reference of glq.kv.layout."""
    if dtype not in (torch.float16, torch.bfloat16) or layout.head_dim not in HEAD_DIMS:
        raise GlqError(f"the kernel that reads a KV cache does not take {dtype} keys of {layout.head_dim} channels")
    if pages.stride(1) != 1 or pages.stride(0) % 16 or page_table_row.stride(0) != 1:
        raise GlqError("the kernel that reads a KV cache takes contiguous rows, and pages that begin at 16 bytes")
    check_factors(factors, layout, pages.device)
    shape = (tokens, layout.heads, layout.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=pages.device) for _ in range(2))
    if tokens:
        tables = device_tables(pages.device)
        blocks = min(ceil(tokens / 2) * 2 * layout.heads // _WARPS + 1, _RESIDENT * gpu.multiprocessors)
        shared = len(tables) + _WARPS * 2 * layout.head_dim * 4
        tensors = (pages, page_table_row.int(), tables, factors, keys, values)
        sizes = (layout.heads, pages.stride(0), tokens)
        gpu.launch(source(dtype, layout), "gather_tokens", blocks, 32 * _WARPS, shared, *tensors, *sizes)
    return keys, values
