"""The product with some tokens on a Hopper GPU: launches ops/batch.cu."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from glq import nvrtc
from glq.codecs import Codec, get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import FRAGMENTS, ROOM, rotation, with_room
from glq.ops.cuda_table import HOLE, copies_in, decoder, device_table, macros, spread, table_bytes, with_signs
from glq.ops.cuda_tiled import Launch, Product
from glq.ops.matrix import Matrix

MOST = 128  # tokens
_SHARED = 227 * 1024  # bytes of shared memory of a block
_BARRIERS = 256  # bytes
_MAX_STAGES = 12
_MAX_PARTS = 8  # so that only 18 such kernels and more at a time could wait for each other (batch.cu)
_SMALL, _SMALLER = 1 << 25, 1 << 24  # weights of a matrix
_TALLER = 1.75  # what a tile of 256 rows takes of the time of one of 128, with 64 tokens


@dataclass(frozen=True)
class Shape:
    """Of a block of threads."""

    tokens: int  # of a tile of y
    shared_by: int  # warps that have a tile of codes together
    wr: int  # warpgroups side by side along the rows
    wk: int  # warpgroups that take turns along the columns

    @property
    def rows(self) -> int:
        """Of a tile of y."""
        return 256 // self.shared_by * self.wr

    @property
    def threads(self) -> int:
        return 128 * self.wr * self.wk


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU: ops/batch.cu."""

    codec: Codec
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    shape: Shape
    copies: int  # of the table in shared memory
    stages: int  # units of x on their way
    parts: int  # blocks that have a tile of y together

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block. The stages lie in the holes of a table that has some."""
        table, stages = table_bytes(self.codec, self.copies), self.stages * self.shape.tokens * 128
        sums = 4 * self.shape.rows * (self.shape.wk * self.shape.tokens + 1)  # and scales, where the rest was
        return max(table if spread(self.codec, self.copies) else table + stages + _BARRIERS, sums)

    @cached_property
    def source(self) -> nvrtc.Source:
        defined = macros(
            self.codec,
            self.copies,
            self.dtype,
            self.scale,
            TOKENS=self.shape.tokens,
            SHARED_BY=self.shape.shared_by,
            WR=self.shape.wr,
            WK=self.shape.wk,
            STAGES=self.stages,
            PARTS=self.parts,
        )
        parts = ("wgmma", "output", "exchange")
        return nvrtc.Source(
            (*decoder(self.codec), *(f"ops/{name}.cuh" for name in parts), "ops/batch.cu"), defined, of_one_arch=True
        )

    def tiles(self, tokens: int, out_features: int) -> int:
        """Of y."""
        return -(-tokens // self.shape.tokens) * -(-out_features // self.shape.rows)


def make_plan(tokens: int, dtype: torch.dtype, matrix: Matrix, multiprocessors: int) -> Plan | None:
    """What was fastest on an H100 (docs/decisions.md, "Kernels for some tokens"); None: ops/prompt.cu was."""
    if tokens > MOST:
        return None
    codec, tall = get_codec(matrix.codec), _tall(tokens, matrix, multiprocessors)
    shape = _shape(tokens, matrix, codec, tall) if isinstance(codec, Trellis) else _of_lattice(tokens, tall)
    if shape is None:
        return None
    return spread_out(fill(codec, dtype, matrix.scale, shape), tokens, matrix, multiprocessors)


def _tall(tokens: int, matrix: Matrix, multiprocessors: int) -> bool:
    """Whether tiles have 256 rows: there are too many for all tiles of 128 at once, unless those take less time."""
    tiles = -(-matrix.rows // 128)
    if tiles <= multiprocessors or not 32 < tokens <= 64:
        return tiles > multiprocessors
    return _TALLER * _turns(-(-matrix.rows // 256), matrix, multiprocessors) <= _turns(tiles, matrix, multiprocessors)


def _turns(tiles: int, matrix: Matrix, multiprocessors: int) -> float:
    """Tiles of a multiprocessor, one after the other, where several share what is left of them."""
    turns, rest = divmod(tiles, multiprocessors)
    return turns + (1 / _parts(rest, matrix, multiprocessors) if rest else 0)


def _of_lattice(tokens: int, tall: bool) -> Shape:
    """Warps have tiles of 32 rows each, so two have 64 together."""
    if tokens <= 64:
        return Shape(32 if tokens <= 32 else 64, 2, *((2, 2) if tall else (1, 4)))
    return Shape(128, 2, *((2, 1) if tall else (1, 2)))


def _shape(tokens: int, matrix: Matrix, codec: Trellis, tall: bool) -> Shape | None:
    weights = matrix.rows * matrix.cols
    if tokens <= 32:
        return Shape(32, 2, 1, 4) if weights < _SMALL else Shape(32, 1, 1, 4 if codec.signs == 2 else 3)
    if tokens <= 64:
        return Shape(64, 2, 2, 2) if tall else Shape(64, 2, 1, 4)
    if tall or (codec.signs == 2 and weights >= _SMALL):
        return None
    return Shape(128, 4, *((1, 3) if codec.signs and weights <= _SMALLER else (2, 2)))


def fill(codec: Codec, dtype: torch.dtype, scale: torch.dtype, shape: Shape, parts: int = 1) -> Plan:
    """As many copies of the table as 128 KB hold, and as many stages as there is room for."""
    copies, stage = copies_in(codec, 128), 128 * shape.tokens
    if shape.shared_by > 1:  # where instructions are what it waits for
        copies = with_signs(codec, copies)
    left = 3 * HOLE if spread(codec, copies) else _SHARED - ROOM - table_bytes(codec, copies)
    return Plan(codec, dtype, scale, shape, copies, min(_MAX_STAGES, (left - _BARRIERS) // stage), parts)


def spread_out(plan: Plan, tokens: int, matrix: Matrix, multiprocessors: int) -> Plan:
    """The same, with as many blocks for each tile of y as there are multiprocessors for, up to _MAX_PARTS."""
    return replace(plan, parts=_parts(plan.tiles(tokens, matrix.rows), matrix, multiprocessors))


def _parts(tiles: int, matrix: Matrix, multiprocessors: int) -> int:
    return max(1, min(multiprocessors // tiles, matrix.tiles[1], _MAX_PARTS))


def make_product(
    plan: Plan, tokens: int, kind: int, matrix: Matrix, device: torch.device, gpu: nvrtc.Launcher
) -> Product:
    """For x of that kind, on a GPU whose arch is 90.

    Tiles that are left when all multiprocessors have had one, or several, have a launch of their own, in which several
    blocks share one.
    """
    token_blocks = -(-tokens // plan.shape.tokens)
    padded, rows_of_tiles = token_blocks * plan.shape.tokens, plan.tiles(1, matrix.rows)
    rest = rows_of_tiles % gpu.multiprocessors if token_blocks == 1 and plan.parts == 1 else 0
    parts = _parts(rest, matrix, gpu.multiprocessors) if 0 < rest < rows_of_tiles else 1
    cut = rows_of_tiles - rest if parts > 1 else rows_of_tiles
    launches = [_launch(plan, tokens, padded, 0, cut, matrix, gpu)]
    if parts > 1:
        launches.append(_launch(replace(plan, parts=parts), tokens, padded, cut, rest, matrix, gpu))
    return Product(
        rotation(tokens, kind, plan.dtype, matrix.cols, matrix.block, padded, FRAGMENTS, gpu),
        device_table(plan.codec, plan.copies, device, plan.dtype),
        tuple(launches),
        gpu,
    )


def _launch(
    plan: Plan, tokens: int, padded: int, first: int, count: int, matrix: Matrix, gpu: nvrtc.Launcher
) -> Launch:
    """Of `count` tiles below each other, from the first-th on."""
    row_tiles, col_tiles = matrix.tiles
    assert plan.parts <= col_tiles
    token_blocks = padded // plan.shape.tokens
    grid = (token_blocks * plan.parts, count)
    sums = token_blocks * count * (plan.parts - 1) * plan.shape.rows * plan.shape.tokens
    sizes = (tokens, padded, matrix.rows, row_tiles, col_tiles, first)
    return Launch(plan.source, "batch", grid, plan.shape.threads, with_room(plan.shared, gpu), sums, sizes)
