"""The rotation of x on an NVIDIA GPU, into the order in which the kernels read it: launches ops/rotate.cu."""

from functools import lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.ops.inputs import PLAIN, Input, plain
from glq.rotation import hartley, odd_part

TILES, SWIZZLED, FRAGMENTS, _ROWS = range(4)  # macro LAYOUT: of decode.cu, prefill.cu, batch.cu; as x was
FEW = 256  # tokens
_TOGETHER = 8  # tokens of a block of threads at once, where there are more
_CHUNK = 256 * (4 * _TOGETHER + 2)  # bytes of shared memory for 256 columns of them, and their signs


def rotate_tiles(x: Input, signs: Tensor, block: int, held: int, layout: int, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] → [column tiles, held ≥ tokens, 72 (TILES) or 64]; rows beyond are not written."""
    tiles = x.first.new_empty(-(-x.shape[1] // 64), held, 72 if layout == TILES else 64)
    return _rotate(x, signs, block, tiles, held, layout, gpu)


def rotate_pairs(
    x: Tensor, signs: Tensor, block: int, blocks: Tensor, slots: Tensor, each: int, gpu: nvrtc.Launcher
) -> Tensor:
    """Row slots[i] // each of x [rows, in], for blocks[0] equal parts of slots → [column tiles, slots, 64], SWIZZLED.

    blocks [1 + most] and slots [tokens · most] int32, as route.cu writes them; what is beyond, or −1, is not read.
    """
    tiles, most = x.new_empty(x.shape[1] // 64, len(slots), 64), len(blocks) - 1
    gathered = (blocks, slots, each, len(slots), x.shape[1], len(slots) // most)
    _launch_many(plain(x), signs, block, tiles, SWIZZLED, len(slots), gathered, gpu)
    return tiles


def rotate_rows(x: Tensor, signs: Tensor, block: int, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] fp16 or bf16 → [tokens, 64 · column tiles], filled up with zeros."""
    out = x.new_empty(len(x), -(-x.shape[1] // 64) * 64)
    return _rotate(plain(x), signs, block, out, len(x), _ROWS, gpu)


def _rotate(x: Input, signs: Tensor, block: int, out: Tensor, held: int, layout: int, gpu: nvrtc.Launcher) -> Tensor:
    tokens, in_features = x.shape
    source, blocks = _source(x.dtype, x.kind, block, layout), in_features // block
    assert x.kind == PLAIN or makes(block, tokens)
    if by_warps(block) and tokens <= FEW:
        tensors, sizes = (*x.tensors, signs, out), (*x.sizes, held, in_features)
        gpu.launch(source, "rotate_chunks", (tokens, blocks), block // 8, 0, *tensors, *sizes)
    elif by_warps(block):
        _launch_many(x, signs, block, out, layout, tokens, (None, None, 1, held, in_features, tokens), gpu)
    else:
        odd = odd_part(block)
        tensors = (x.first, signs, hartley(odd, torch.float32, x.device), out)
        sizes = (held, in_features, block, odd)
        gpu.launch(source, "rotate_tiles", (tokens, blocks), 256, 8 * block, *tensors, *sizes)
    return out


@lru_cache(4096)
def _source(dtype: torch.dtype, kind: int, block: int, layout: int, gather: bool = False) -> nvrtc.Source:
    chunks = block // 256 if by_warps(block) else 1
    macros = {"BF16": int(dtype == torch.bfloat16), "CHUNKS": chunks, "LAYOUT": layout, "INPUT": kind}
    macros["GATHER"] = int(gather)
    return nvrtc.Source(("ops/ptx.cuh", "ops/hadamard.cuh", "ops/input.cuh", "ops/rotate.cu"), tuple(macros.items()))


def _launch_many(
    x: Input,
    signs: Tensor,
    block: int,
    out: Tensor,
    layout: int,
    most: int,
    gathered: tuple[Tensor | None, Tensor | None, int, int, int, int],
    gpu: nvrtc.Launcher,
) -> None:
    """rotate_many, whose last arguments are `gathered`, for `most` tokens at most."""
    chunks, columns = block // 256, x.shape[1] // block
    groups, shared = -(-most // _TOGETHER), chunks * _CHUNK
    resident = max(1, min(16 // chunks, gpu.shared_memory // (shared + nvrtc.RESERVED)))  # on a multiprocessor
    turns = -(-groups // max(1, resident * gpu.multiprocessors // columns))
    source, grid = _source(x.dtype, x.kind, block, layout, gathered[0] is not None), (-(-groups // turns), columns)
    gpu.launch(source, "rotate_many", grid, 32 * chunks, shared, x.first, signs, out, *gathered)


def makes(block: int, tokens: int) -> bool:
    """Whether a rotation makes an x that is not plain, too."""
    return by_warps(block) and tokens <= FEW


def by_warps(block: int) -> bool:
    """Whether warps divide a block of the rotation: they transform 256 columns each."""
    return block % 256 == 0 and block <= 2048
