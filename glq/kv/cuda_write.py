"""New tokens into a paged E8 cache on an NVIDIA GPU: launches kv/write.cu."""

from math import ceil

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError
from glq.kv.cuda_attend import HEAD_DIMS, check_factors
from glq.kv.cuda_tables import device_tables, halves_at
from glq.kv.layout import PageLayout


def source(dtype: torch.dtype, layout: PageLayout) -> nvrtc.Source:
    macros = {
        "BF16": int(dtype == torch.bfloat16),
        "DIM": layout.head_dim,
        "KEY_BITS": layout.key_bits,
        "VALUE_BITS": layout.value_bits,
        "PAGE_TOKENS": layout.page_tokens,
        "THREADS": threads(layout),
    }
    files = ("ops/ptx.cuh", "ops/hadamard.cuh", "kv/mix.cuh", "kv/write.cu")
    return nvrtc.Source(files, tuple(macros.items()))


def threads(layout: PageLayout) -> int:
    """Of a block: nine for each word, as many as a word has steps to be tried; at 2 bits a warp, of 16 at most."""
    words = layout.head_dim // 8
    return 32 * (min(words, 16) if 2 in (layout.key_bits, layout.value_bits) else ceil(words * 9 / 32))


def write(
    pages: Tensor,
    layout: PageLayout,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    factors: Tensor | None,
    gpu: nvrtc.Launcher,
) -> None:
    """As write_reference of glq.kv.layout."""
    tokens, heads, dim = keys.shape
    if keys.dtype not in (torch.float16, torch.bfloat16) or keys.dtype != values.dtype or dim not in HEAD_DIMS:
        raise GlqError(f"the kernel that writes a KV cache does not take {keys.dtype} keys of {dim} channels")
    if (heads, dim) != (layout.heads, layout.head_dim) or keys.shape != values.shape or slots.shape != (tokens,):
        raise GlqError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and slots do not belong together")
    if keys.stride(2) != 1 or values.stride(2) != 1 or slots.stride(0) != 1 or pages.stride(1) != 1:
        raise GlqError("the kernel that writes a KV cache takes contiguous rows")
    check_factors(factors, layout, keys.device)
    if not tokens:
        return
    tensors = (keys, values, slots.long(), device_tables(keys.device)[halves_at() :], factors, pages)
    sizes = (heads, pages.stride(0), *keys.stride()[:2], *values.stride()[:2])
    gpu.launch(source(keys.dtype, layout), "write_tokens", (tokens, 2 * heads), threads(layout), 0, *tensors, *sizes)
