"""The product with few tokens on an NVIDIA GPU: launches ops/decode.cu, for trellis codes."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.errors import GlqError
from glq.ops.cuda_rotate import TILES, by_warps, rotate_tiles
from glq.ops.cuda_table import HOLE, copies_in, device_table, macros, spread, table_bytes
from glq.ops.inputs import NORM, PLAIN, Input, plain
from glq.packed import PackedLinear


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU."""

    codec: Trellis
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    tokens: int
    wr: int  # row tiles of a unit
    wk: int  # column tiles of a unit
    copies: int  # of the table in shared memory
    block: int  # width of the rotation, in the kernel; 0: x comes rotated
    input: int = PLAIN  # what x is made of, in the kernel

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

    def shared(self, cols: int) -> int:
        """Bytes of shared memory a block."""
        sums, x = self._parts(cols)
        table = table_bytes(self.codec, self.copies)
        return table if spread(self.codec, self.copies) else table + sums + x

    @property
    def far(self) -> int:
        """Units whose codes are requested into the L2 cache ahead of their loads: where codes are what it waits for."""
        return 2 if self.tokens == 1 and self.copies == 32 else 0

    def fits(self, cols: int, gpu: nvrtc.Launcher) -> bool:
        sums, x = self._parts(cols)
        if spread(self.codec, self.copies) and (sums > HOLE or x > (HOLE if self.block else 2 * HOLE)):
            return False
        return self.shared(cols) + nvrtc.RESERVED <= gpu.shared_memory

    def _parts(self, cols: int) -> tuple[int, int]:
        """Bytes of what warps add up, in whose place x is rotated before; and of x, of which two units are held."""
        warps = self.wr * self.wk
        sums = 4 * max(64 * min(self.tokens, 8) * warps, (256 + (self.input == NORM)) * warps if self.block else 0)
        return sums, 2 * cols if self.block else 2 * 2 * self.wk * self.held * 72

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
        )
        parts = ("ptx", "hadamard", "input", "tiles", "exchange", "units", "one_token")
        return nvrtc.Source((*(f"ops/{name}.cuh" for name in parts), "ops/decode.cu"), defined)


def max_tokens(arch: int) -> int:
    """Of a launch: others have too little shared memory for 64, or their assembler runs out of registers."""
    return 64 if arch in (80, 90) else 32


@lru_cache(4096)
def make_plan(
    codec: Trellis,
    dtype: torch.dtype,
    scale: torch.dtype,
    tokens: int,
    tiles: tuple[int, int],
    block: int,
    gpu: nvrtc.Launcher,
    kind: int = PLAIN,
) -> Plan:
    """What was fastest on an H100 for a matrix of so many row and column tiles (docs/benchmarks.md).

    One token is rotated in the kernel, where warps divide the blocks of the rotation, by one large block of threads a
    multiprocessor; more tokens in a launch of their own. Few tiles a warp: all warps of a block share a row of them.
    """
    few = tiles[0] * tiles[1] < 3 * 16 * gpu.multiprocessors
    width = block if tokens == 1 and by_warps(block) else 0
    shapes = [(2, 8), (2, 4)] if tokens <= 16 else [(2, 4), (4, 2)]
    if few:
        shapes.insert(0, (1, 16 if tokens <= 8 else 8))
    for copies, (wr, wk) in product((copies_in(codec, size) for size in (128, 64, 32)), shapes):
        plan = Plan(codec, dtype, scale, tokens, wr, wk, copies, width, kind if width else PLAIN)
        if plan.fits(64 * tiles[1], gpu):
            return plan
    if width == 0:
        raise GlqError(f"the kernel for {tokens} tokens needs more shared memory than this GPU has")
    return make_plan(codec, dtype, scale, tokens, tiles, 1, gpu, kind)  # rotated in a launch of its own


def matmul(x: Input, weight: PackedLinear, gpu: nvrtc.Launcher, plan: Plan | None = None) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in] with 1 to max_tokens(gpu.arch) tokens."""
    tokens, in_features = x.shape
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    row_tiles, col_tiles, _ = weight.codes.shape
    if plan is None:
        plan = make_plan(
            trellis, x.dtype, weight.scale.dtype, tokens, (row_tiles, col_tiles), weight.block, gpu, x.kind
        )
    units = -(-row_tiles // plan.wr) * -(-col_tiles // plan.wk)
    grid = min(units, gpu.multiprocessors)
    y = torch.empty(tokens, weight.out_features, dtype=x.dtype, device=x.device)
    table = device_table(trellis, x.device, x.dtype)
    if not plan.block:
        x = plain(rotate_tiles(x, weight.signs, weight.block, plan.held, TILES, gpu))
    sums = grid * plan.wr * 64 * tokens
    own = torch.empty(sums, dtype=torch.float32, device=x.device)
    tensors = (weight.codes, *x.tensors, weight.signs, table, weight.scale, y, gpu.exchange(sums), own)
    sizes = (*x.sizes, tokens, weight.out_features, in_features, row_tiles, col_tiles, units // grid, units % grid)
    gpu.launch(plan.source, "decode", grid, plan.threads, plan.shared(64 * col_tiles), *tensors, *sizes)
    return y
