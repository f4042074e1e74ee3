"""Rotary position embedding, and keys and values into the pages of a KV cache: launches ops/rope.cu."""

import warnings
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError

_THREADS = 128  # of a block, as in rope.cu
_VECTOR = 8  # values that a thread reads at once


@dataclass(frozen=True, eq=False)
class Turn:
    """By which angles the columns of heads turn, where a token stands."""

    positions: Tensor  # [tokens] int64
    angles: Tensor  # [positions, rotated]: as many cosines as sines, rotated / 2 of each
    head_size: int  # columns, of which those beyond `rotated` stay
    halves: bool  # column i turns with i + rotated / 2 ("neox"), else 2i with 2i + 1

    @property
    def rotated(self) -> int:
        return self.angles.shape[-1]


@dataclass(frozen=True, eq=False)
class Cache:
    """Where keys and values go: views [pages, page size, heads, head size] of the same strides."""

    keys: Tensor
    values: Tensor
    slots: Tensor  # [≤ tokens] int64: page · page size + place in it; negative: nowhere


@cache
def works(device: torch.device) -> bool:
    """Whether CUDA C++ compiles and loads here, and the kernel computes what PyTorch does."""
    if device.type != "cuda" or not nvrtc.compiles_for(device):
        return False
    try:
        _try_out(device)
    except Exception as error:  # noqa: BLE001 (cuda-core, NVRTC and the driver have kinds of their own)
        warnings.warn(f"glq's rotary embedding cannot be used, vLLM's is: {error}", stacklevel=2)
        return False
    return True


def _try_out(device: torch.device) -> None:
    tokens, head_size = 3, 64
    qkv = torch.linspace(-1, 1, tokens * 4 * head_size).view(tokens, -1).half()
    q, k, v = qkv.split([2 * head_size, head_size, head_size], 1)
    positions, phase = torch.tensor([5, 0, 3]), torch.arange(6)[:, None] / torch.arange(1, 33)
    angles = torch.cat((phase.cos(), phase.sin()), 1).half()
    pages = torch.zeros(2, 1, 4, 2 * head_size, dtype=torch.half, device=device)
    keys, values = pages.transpose(1, 2).split(head_size, -1)
    cache = Cache(keys, values, torch.tensor([6, -1, 1], device=device))
    by, on_gpu = Turn(positions, angles, head_size, True), [x.to(device) for x in (q, k, v)]
    there = Turn(positions.to(device), angles.to(device), head_size, True)
    found = rope(on_gpu[0], on_gpu[1], on_gpu[2], there, cache, nvrtc.gpu(device))
    expected = (reference(q, by), reference(k, by))
    cached = torch.zeros(8, 2 * head_size)
    cached[torch.tensor([6, 1])] = torch.cat((expected[1], v.float()), 1)[[0, 2]]
    for one, wanted in (*zip(found, expected, strict=True), (pages.view(8, -1), cached)):
        if not torch.allclose(one.float().cpu(), wanted, rtol=1e-3, atol=1e-3):
            raise GlqError("it computes something else than PyTorch on this GPU")


def reference(x: Tensor, by: Turn) -> Tensor:
    """What `rope` makes of x [tokens, heads · head size], in fp32."""
    half = by.rotated // 2
    cos, sin = by.angles[by.positions].float()[:, None].split(half, -1)
    heads = x.float().view(len(x), -1, by.head_size).clone()
    part = heads[..., : 2 * half]
    a, b = (part[..., :half], part[..., half:]) if by.halves else (part[..., ::2], part[..., 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    heads[..., : 2 * half] = torch.cat(turned, -1) if by.halves else torch.stack(turned, -1).flatten(-2)
    return heads.flatten(1)


def takes(q: Tensor, k: Tensor, v: Tensor, by: Turn, cache: Cache | None) -> bool:
    """Whether the kernel takes these, as `rope` does: 16-bit values of one type, in whole pieces of 16 bytes."""
    tensors = (q, k, v, by.angles) if cache is None else (q, k, v, by.angles, cache.keys, cache.values)
    addresses = steps = 0  # of which none has a low bit: all at once, as this is asked of every layer
    for t in tensors:
        *outer, last = t.stride()
        if t.dtype != q.dtype or last != 1:
            return False
        addresses |= t.data_ptr()
        for stride in outer:
            steps |= stride
    integers = (by.positions,) if cache is None else (by.positions, cache.slots)
    return (
        addresses % 16 == 0
        and steps % _VECTOR == 0
        and q.dtype in (torch.float16, torch.bfloat16)
        and by.angles.is_contiguous()
        and all(t.dtype == torch.int64 and t.is_contiguous() for t in integers)
        and by.head_size % _VECTOR == 0
        and by.rotated % (2 * _VECTOR if by.halves else _VECTOR) == 0
        and by.rotated <= by.head_size
        and v.shape == k.shape
        and (cache is None or (cache.keys.stride() == cache.values.stride() and cache.keys.shape[-1] == by.head_size))
    )


def rope(q: Tensor, k: Tensor, v: Tensor, by: Turn, cache: Cache | None, gpu: nvrtc.Launcher) -> tuple[Tensor, Tensor]:
    """q [tokens, heads · head size] and k [tokens, KV heads · head size], turned; k and v also go to the cache.

    takes() is true of all. RoPE: https://arxiv.org/abs/2104.09864
    """
    (tokens, columns), kv_columns, size = q.shape, k.shape[1], by.head_size
    to_q, to_k = q.new_empty(tokens, columns), k.new_empty(tokens, kv_columns)
    source, blocks = _plan(q.dtype, columns // size, kv_columns // size, size, by.rotated, by.halves)
    slots, keys, values, *places = (None, None, None, 0, 1, 0, 0, 0) if cache is None else _places(cache)
    tensors = (q, k, v, by.positions, by.angles, slots, to_q, to_k, keys, values)
    sizes = (q.stride(0), k.stride(0), v.stride(0), columns // size, kv_columns // size, *places)
    if tokens:
        gpu.launch(source, "rope", (tokens, blocks), _THREADS, 0, *tensors, *sizes)
    return to_q, to_k


def _places(cache: Cache) -> tuple[Tensor, Tensor, Tensor, int, int, int, int, int]:
    keys, slots = cache.keys, cache.slots
    page, token, head, _ = keys.stride()
    return slots, keys, cache.values, slots.shape[0], keys.shape[1], page, token, head


@lru_cache
def _plan(
    dtype: torch.dtype, heads: int, kv_heads: int, head_size: int, rotated: int, halves: bool
) -> tuple[nvrtc.Source, int]:
    """And how many blocks of threads have a token."""
    turned = rotated // (16 if halves else 8) + (head_size - rotated) // 8
    threads = (heads + kv_heads) * turned + kv_heads * head_size // 8
    return _source(dtype, head_size, rotated, halves), -(-threads // _THREADS)


def _source(dtype: torch.dtype, head_size: int, rotated: int, halves: bool) -> nvrtc.Source:
    macros = {"BF16": int(dtype == torch.bfloat16), "HEAD": head_size, "ROTATED": rotated, "HALVES": int(halves)}
    return nvrtc.Source(("ops/ptx.cuh", "ops/rope.cu"), tuple(macros.items()))
