"""New tokens into a paged E8 cache on an NVIDIA GPU: launches kv/write.cu."""

from math import ceil

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError
from glq.kv.cuda_attend import HEAD_DIMS
from glq.kv.cuda_tables import device_tables, halves_at


def source(dtype: torch.dtype, head_dim: int, key_bits: int, value_bits: int, page_tokens: int) -> nvrtc.Source:
    macros = {
        "BF16": int(dtype == torch.bfloat16),
        "DIM": head_dim,
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "PAGE_TOKENS": page_tokens,
        "THREADS": threads(head_dim),
    }
    files = ("ops/ptx.cuh", "ops/hadamard.cuh", "kv/mix.cuh", "kv/write.cu")
    return nvrtc.Source(files, tuple(macros.items()))


def threads(head_dim: int) -> int:
    """Of a block: nine for each word, as many as a word has scales to be tried."""
    return 32 * ceil(head_dim // 8 * 9 / 32)


def write(
    keys: Tensor, values: Tensor, pages: Tensor, shape: tuple[int, int, int, int], slots: Tensor, gpu: nvrtc.Launcher
) -> None:
    """As glq.kv.pages.write; shape: kv heads, bits of keys, bits of values, tokens of a page."""
    kv_heads, key_bits, value_bits, page_tokens = shape
    tokens, heads, dim = keys.shape
    if keys.dtype not in (torch.float16, torch.bfloat16) or keys.dtype != values.dtype or dim not in HEAD_DIMS:
        raise GlqError(f"the kernel that writes a KV cache does not take {keys.dtype} keys of {dim} channels")
    if heads != kv_heads or keys.shape != values.shape or slots.dtype != torch.int64 or slots.shape != (tokens,):
        raise GlqError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and slots do not belong together")
    if keys.stride(2) != 1 or values.stride(2) != 1 or slots.stride(0) != 1 or pages.stride(1) != 1:
        raise GlqError("the kernel that writes a KV cache takes contiguous rows")
    if not tokens:
        return
    compiled = source(keys.dtype, dim, key_bits, value_bits, page_tokens)
    tensors = (keys, values, slots, device_tables(keys.device)[halves_at() :], pages)
    sizes = (kv_heads, pages.stride(0), *keys.stride()[:2], *values.stride()[:2])
    gpu.launch(compiled, "write_tokens", (tokens, 2 * kv_heads), threads(dim), 0, *tensors, *sizes)
