"""The product with few tokens on an NVIDIA GPU: launches ops/decode.cu."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import Codec, get_codec
from glq.codecs.e8 import ResidualE8
from glq.codecs.nested import NestedE8
from glq.errors import GlqError
from glq.ops.cuda_rotate import TILES, Rotation, by_warps, rotation, with_room
from glq.ops.cuda_table import HOLE, copies_in, decoder, device_table, macros, spread, table_bytes
from glq.ops.inputs import NORM, PLAIN, Input, plain
from glq.ops.matrix import Matrix


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU."""

    codec: Codec
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    tokens: int
    wr: int  # row tiles of a unit
    wk: int  # column tiles of a unit
    copies: int  # of the table in shared memory
    block: int  # width of the rotation, in the kernel; 0: x comes rotated
    input: int = PLAIN  # what x is made of, in the kernel
    packed: int = 0  # columns of x that a block has then, side by side; 0: all, in their places

    @property
    def token_tiles(self) -> int:
        return -(-self.tokens // 8)

    @property
    def held(self) -> int:
        """Tokens in a tile of x."""
        return self.tokens if self.token_tiles == 1 else 8 * self.token_tiles

    @property
    def threads(self) -> int:
        return 32 * self.wr * self.wk

    def units(self, matrix: Matrix) -> int:
        row_tiles, col_tiles = matrix.tiles
        return -(-row_tiles // self.wr) * -(-col_tiles // self.wk)

    def shared(self, cols: int) -> int:
        """Bytes of shared memory a block."""
        sums, x = self._parts(cols)
        table = table_bytes(self.codec, self.copies)
        return table if spread(self.codec, self.copies) else table + sums + x

    @property
    def far(self) -> int:
        """Units whose codes are requested into the L2 cache ahead of their loads: where codes are what it waits for."""
        slow = isinstance(self.codec, ResidualE8 | NestedE8)  # to decode
        return int((self.tokens == 1 or (self.tokens > 8 and self.wr == 1)) and not slow)

    def fits(self, cols: int, gpu: nvrtc.Launcher) -> bool:
        sums, x = self._parts(cols)
        if spread(self.codec, self.copies) and (sums > HOLE or x > (HOLE if self.block else 2 * HOLE)):
            return False
        return self.shared(cols) + nvrtc.RESERVED <= gpu.shared_memory

    def _parts(self, cols: int) -> tuple[int, int]:
        """Bytes of what warps add up, in whose place x is rotated before; and of x, of which two units are held."""
        warps = self.wr * self.wk
        sums = 4 * max(64 * min(self.tokens, 8) * warps, (256 + (self.input == NORM)) * warps if self.block else 0)
        return sums, 2 * (self.packed or cols) if self.block else 2 * 2 * self.wk * self.held * 72

    @cached_property
    def source(self) -> nvrtc.Source:
        defined = macros(
            self.codec,
            self.copies,
            self.dtype,
            self.scale,
            NT=self.token_tiles,
            WR=self.wr,
            WK=self.wk,
            BLOCK=self.block,
            FAR=self.far,
            INPUT=self.input,
            PACKED=int(self.packed > 0),
        )
        parts = ("hadamard", "input", "exchange", "units", "one_token")
        return nvrtc.Source((*decoder(self.codec), *(f"ops/{name}.cuh" for name in parts), "ops/decode.cu"), defined)


def max_tokens(arch: int) -> int:
    """Of a launch: others have too little shared memory for 64, or their assembler runs out of registers."""
    return 64 if arch in (80, 90) else 32


def make_plan(tokens: int, kind: int, dtype: torch.dtype, matrix: Matrix, gpu: nvrtc.Launcher) -> Plan:
    """What was fastest on an H100 (docs/benchmarks.md), for x of that kind.

    One token is rotated in the kernel, where warps divide the blocks of the rotation, by one large block of threads a
    multiprocessor; more tokens in a launch of their own. Few tiles a warp: all warps of a block share a row of them;
    many rows: two or four do.
    """
    codec, (row_tiles, col_tiles) = get_codec(matrix.codec), matrix.tiles
    few = row_tiles * col_tiles < 3 * 16 * gpu.multiprocessors
    width = matrix.block if tokens == 1 and by_warps(matrix.block) else 0
    shapes = [(2, 8), (2, 4)] if tokens <= 16 else [(2, 4), (4, 2)]
    if few:
        shapes.insert(0, (1, 16 if tokens <= 8 else 8))
    elif isinstance(codec, NestedE8):
        pass  # whose decoding is what it waits for
    elif tokens == 1 and matrix.rows >= 8192:
        shapes.insert(0, (8, 2))
    elif tokens <= 16 and matrix.rows >= 16384:
        shapes.insert(0, (4, 4))
    for copies, (wr, wk), packed in product((copies_in(codec, size) for size in (128, 64, 32)), shapes, (False, True)):
        plan = Plan(codec, dtype, matrix.scale, tokens, wr, wk, copies, width, kind if width else PLAIN)
        if packed:
            plan = replace(plan, packed=_needed(plan, matrix, gpu.multiprocessors))
        if plan.fits(64 * col_tiles, gpu):
            return plan
    if width == 0:
        raise GlqError(f"the kernel for {tokens} tokens needs more shared memory than this GPU has")
    return make_plan(tokens, kind, dtype, matrix._replace(block=1), gpu)  # rotated in a launch of its own


def _needed(plan: Plan, matrix: Matrix, multiprocessors: int) -> int:
    """Columns of x that a block needs at most, which rotates them; 0 if it may need some of them twice, or all."""
    units = plan.units(matrix)
    columns = -(-units // min(units, multiprocessors)) * plan.wk * 64 + 2 * plan.block
    return columns if plan.block and columns <= matrix.cols else 0


@dataclass(frozen=True, eq=False)
class Product:
    """For matrices of one size and one number of tokens: all of its launches but the tensors."""

    plan: Plan
    rotation: Rotation | None  # None: x is rotated in the kernel
    table: Tensor
    grid: int
    shared: int
    sizes: tuple[int, ...]  # tokens, rows, columns, …
    gpu: nvrtc.Launcher

    def __call__(self, x: Input, codes: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        """x [tokens, in] and the tensors of a PackedLinear → [tokens, out]."""
        plan, (tokens, rows, *_) = self.plan, self.sizes
        y = x.first.new_empty(tokens, rows)
        if self.rotation is not None:
            x = plain(self.rotation(x, signs))
        sums = self.grid * plan.wr * 64 * tokens
        own = x.first.new_empty(sums, dtype=torch.float32)
        tensors = (codes, *x.tensors, signs, self.table, scale, y, self.gpu.exchange(sums), own)
        self.gpu.launch(plan.source, "decode", self.grid, plan.threads, self.shared, *tensors, *x.sizes, *self.sizes)
        return y


def make_product(plan: Plan, kind: int, matrix: Matrix, device: torch.device, gpu: nvrtc.Launcher) -> Product:
    """For x of that kind, of as many tokens as the plan is for: at most max_tokens(gpu.arch)."""
    row_tiles, col_tiles = matrix.tiles
    units = plan.units(matrix)
    grid = min(units, gpu.multiprocessors)
    made = (plan.tokens, kind, plan.dtype, matrix.cols, matrix.block, plan.held, TILES, gpu)
    per_row, length = -(-col_tiles // plan.wk), units // grid
    divisors = tuple(_factor(by, units) for by in (per_row, length, length + 1))
    sizes = (plan.tokens, matrix.rows, matrix.cols, row_tiles, col_tiles, length, units % grid, *divisors)
    table = device_table(plan.codec, plan.copies, device, plan.dtype)
    shared = with_room(plan.shared(64 * col_tiles), gpu)
    return Product(plan, None if plan.block else rotation(*made), table, grid, shared, sizes, gpu)


def _factor(by: int, most: int) -> int:
    """What numbers up to `most` are multiplied by instead of being divided (units.cuh, quotient), as int32."""
    assert most * by < 1 << 32
    factor = -((-1 << 32) // by) if by > 1 else 0
    return factor - (1 << 32) if factor >= 1 << 31 else factor
