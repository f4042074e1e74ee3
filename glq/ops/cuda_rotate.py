"""The rotation of x on an NVIDIA GPU, into the order in which the kernels read it: launches ops/rotate.cu."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.ops.inputs import NORM, PLAIN, SILU, Input, plain
from glq.rotation import MAX_BLOCK, hartley, odd_part

TILES, SWIZZLED, FRAGMENTS, _ROWS = range(4)  # macro LAYOUT: of decode.cu, prefill.cu, batch.cu; as x was
_HEADERS = tuple(f"ops/{name}.cuh" for name in ("ptx", "hadamard", "input", "rotation"))
FEW = 16  # tokens up to which a block of threads for each is faster, as it starts beside the product ahead
FEW_OF_SILU = 32  # … of silu(first) · second
MADE = 2048  # … of an x that a rotation makes on the way; with more it is made first …
NORMED = 512  # … as is a normed one
_BESIDE = 4  # tokens of a warp, beside a product
ROOM = 3 << 10  # bytes of shared memory that a block of rotate_few.cu takes
_STEPS = (100 << 10, 132 << 10, 164 << 10, 196 << 10)  # in which a multiprocessor from sm_90 on has it
_ODD_EACH = 4  # tokens of a block of threads where warps do not divide the rotation's
_ROW_THREADS = 128  # of a block of threads whose warps have a token each


@dataclass(frozen=True, eq=False)
class Rotation:
    """A launch for x of one shape, but for its tensors."""

    source: nvrtc.Source
    name: str
    grid: tuple[int, int]
    threads: int
    shared: int
    out: tuple[int, ...]  # shape of what is written
    sizes: tuple[int, ...]  # the last arguments
    odd: int  # part of a block that warps do not divide, or 0
    gpu: nvrtc.Launcher
    power: int = 1  # … and the other one, where tensor cores transform along `odd`

    def __call__(self, x: Input, signs: Tensor) -> Tensor:
        out = x.first.new_empty(self.out)
        given: tuple[Tensor | int | None, ...]
        if self.name == "rotate_few":
            given = (*x.tensors, signs, out, *x.sizes)
        elif self.odd:
            given = (x.first, signs, _hartley(self.odd, self.power, x.dtype, x.device), out)
        else:
            given = (x.first, x.second, signs, out, None, None, 1, x.first.stride(0))
        self.gpu.launch(self.source, self.name, self.grid, self.threads, self.shared, *given, *self.sizes)
        return out


def rotate_tiles(x: Input, signs: Tensor, block: int, held: int, layout: int, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] → [column tiles, held ≥ tokens, 72 (TILES) or 64]; rows beyond are not written."""
    return rotation(x.tokens, x.kind, x.dtype, x.shape[1], block, held, layout, gpu)(x, signs)


def rotate_pairs(
    x: Tensor, signs: Tensor, block: int, blocks: Tensor, slots: Tensor, each: int, gpu: nvrtc.Launcher
) -> Tensor:
    """Row slots[i] // each of x [rows, in], for blocks[0] equal parts of slots → [column tiles, slots, 64], SWIZZLED.

    blocks [1 + most] and slots [tokens · most] int32, as route.cu writes them; what is beyond, or −1, is not read.
    """
    tiles, most = x.new_empty(x.shape[1] // 64, len(slots), 64), len(blocks) - 1
    source = _source(x.dtype, PLAIN, block, SWIZZLED, True)
    grid = _grid_of_rows(len(slots), x.shape[1] // block, block, gpu)
    x = plain(x).first
    tensors = (x, x, signs, tiles, blocks, slots)
    sizes = (each, x.shape[1], len(slots), x.shape[1], len(slots) // most, 0)
    gpu.launch(source, "rotate_many", grid, _ROW_THREADS, 0, *tensors, *sizes)
    return tiles


def rotate_rows(x: Tensor, signs: Tensor, block: int, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] fp16 or bf16 → [tokens, 64 · column tiles], filled up with zeros."""
    return rotation(len(x), PLAIN, x.dtype, x.shape[1], block, len(x), _ROWS, gpu)(plain(x), signs)


@lru_cache(4096)
def rotation(
    tokens: int,
    kind: int,
    dtype: torch.dtype,
    in_features: int,
    block: int,
    held: int,
    layout: int,
    gpu: nvrtc.Launcher,
    beside: bool = False,
) -> Rotation:
    """Of x [tokens, in_features], as rotate_tiles or, with layout _ROWS, rotate_rows.

    beside: of x that is not normed, beside the product ahead (ops/prompt.cu), which takes nearly all of the GPU.
    """
    col_tiles, blocks = -(-in_features // 64), in_features // block
    out = (tokens, 64 * col_tiles) if layout == _ROWS else (col_tiles, held, 72 if layout == TILES else 64)
    assert kind == PLAIN or makes(kind, block, tokens)
    assert not beside or (kind != NORM and by_warps(block))
    if not by_warps(block):
        return _odd_rotation(tokens, dtype, in_features, block, held, layout, out, gpu)
    few = {PLAIN: FEW, SILU: FEW_OF_SILU}.get(kind, tokens)
    if tokens <= few and not beside:
        source = _source_of_few(dtype, kind, block, layout)
        return Rotation(source, "rotate_few", (tokens, blocks), block // 8, 0, out, (held, in_features), 0, gpu)
    source = _source(dtype, kind, block, layout)
    sizes: tuple[int, ...] = (held, in_features, tokens, beside)
    grid = _grid_of_rows(tokens, blocks, block, gpu)
    if beside:  # short blocks, so that all multiprocessors take their share of what is left when the product ends
        grid = -(-tokens // (_BESIDE * _ROW_THREADS // 32)), blocks
    return Rotation(source, "rotate_many", grid, _ROW_THREADS, 0, out, sizes, 0, gpu)


def _odd_rotation(
    tokens: int,
    dtype: torch.dtype,
    in_features: int,
    block: int,
    held: int,
    layout: int,
    out: tuple[int, ...],
    gpu: nvrtc.Launcher,
) -> Rotation:
    odd, columns = odd_part(block), in_features // block
    power = block // odd
    if not 8 <= power <= 128:
        source, sizes = _source(dtype, PLAIN, block, layout), (held, in_features, block, odd)
        return Rotation(source, "rotate_tiles", (tokens, columns), 512, 4 * block, out, sizes, odd, gpu)
    each = _ODD_EACH if tokens * columns > 4 * gpu.multiprocessors and block <= MAX_BLOCK else 1
    shared = 2 * each * power * (-(-odd // 16) * 16 + 8)
    macros = (*_macros(dtype, PLAIN, block, layout), ("POWER", power))
    source, grid = nvrtc.Source((*_HEADERS, "ops/rotate_odd.cu"), macros), (-(-tokens // each), columns)
    return Rotation(
        source, "rotate_odd", grid, 256, shared, out, (held, in_features, tokens, odd, each), odd, gpu, power
    )


@lru_cache(4096)
def _source(dtype: torch.dtype, kind: int, block: int, layout: int, gather: bool = False) -> nvrtc.Source:
    macros = (*_macros(dtype, kind, block, layout), ("GATHER", int(gather)))
    return nvrtc.Source((*_HEADERS, "ops/rotate.cu"), macros)


@lru_cache(4096)
def _source_of_few(dtype: torch.dtype, kind: int, block: int, layout: int) -> nvrtc.Source:
    return nvrtc.Source((*_HEADERS, "ops/rotate_few.cu"), _macros(dtype, kind, block, layout))


def _macros(dtype: torch.dtype, kind: int, block: int, layout: int) -> tuple[tuple[str, int], ...]:
    """Those of ops/rotation.cuh."""
    chunks = block // 256 if by_warps(block) else 1
    return ("BF16", int(dtype == torch.bfloat16)), ("INPUT", kind), ("CHUNKS", chunks), ("LAYOUT", layout)


def _grid_of_rows(most: int, columns: int, block: int, gpu: nvrtc.Launcher) -> tuple[int, int]:
    """For `most` tokens at most, and so many blocks of columns: each warp has as many tokens of one, or one less."""
    chunks, warps = block // 256, _ROW_THREADS // 32
    resident = warps * (3 if chunks > 5 else 4 if chunks > 3 else 5 if chunks > 1 else 10) * gpu.multiprocessors
    turns = -(-most // max(1, resident // columns))
    return -(-most // (turns * warps)), columns


@lru_cache
def _hartley(size: int, power: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ops/rotate_odd.cu multiplies by; with a power of 1 ops/rotate.cu, fp32 in rows filled up to 16 bytes."""
    matrix = hartley(size, torch.float64, torch.device("cpu"))
    if power == 1:
        return torch.nn.functional.pad(matrix.float(), (0, -size % 4)).to(device)
    padded = torch.nn.functional.pad(matrix / math.sqrt(power), (0, -size % 16, 0, -size % 16))
    high = padded.to(dtype)
    parts = torch.stack([high, (padded - high).to(dtype)])
    n = len(padded) // 16
    # part, row = 16 n + 8 h + g, column = 16 n + 8 c + 2 t + e → n, n, lane (g, t), part, register (c, h), e
    return parts.view(2, n, 2, 8, n, 2, 4, 2).permute(1, 4, 3, 6, 0, 5, 2, 7).contiguous().to(device)


def with_room(shared: int, gpu: nvrtc.Launcher) -> int:
    """Bytes that a block of `shared` has to ask for, so that the next rotation can start beside it.

    A multiprocessor has as much shared memory as its first block needs, of a few sizes.
    """
    if gpu.arch >= 90 and gpu.shared_memory > _STEPS[-1]:
        for size in _STEPS:
            if size - ROOM < shared + nvrtc.RESERVED <= size:
                return size  # so it has the next one
    return shared


def makes(kind: int, block: int, tokens: int) -> bool:
    """Whether a rotation makes an x of that kind, too."""
    return by_warps(block) and tokens <= (NORMED if kind == NORM else MADE)


def by_warps(block: int) -> bool:
    """Whether warps divide a block of the rotation: they transform 256 columns each, or all of a token's."""
    return block % 256 == 0 and block <= 2048
