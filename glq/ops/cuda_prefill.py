"""The product with many tokens on a Hopper GPU: launches ops/prefill.cu, for trellis codecs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import rotate_tiles
from glq.ops.cuda_table import SCALES, device_table, table_bytes, table_macros
from glq.packed import PackedLinear

ARCH = 90  # the one that has these instructions
_SHARED = 227 * 1024  # bytes of shared memory of a block
_BARRIERS = 256  # bytes
_SHAPES = (
    (64, 2),
    (64, 4),
    (96, 2),
    (96, 3),
    (128, 2),
    (128, 3),
    (192, 2),
    (256, 2),
)  # tokens and warpgroups of a block

# What a multiprocessor does in a cycle, and what takes how many. To be measured: docs/benchmarks.md
_L2 = 40  # bytes from the L2 cache
_SHARED_BYTES = 128
_CONFLICTS = {4: 3.2, 8: 3.0, 16: 2.0, 32: 1.0}  # cycles a read of the table takes, by its copies
_LEAST = 500  # cycles of one unit, however few tokens: what decoding takes from end to end
_START = 3000  # of a block: its table, its first tiles
_MEETING = 1500  # of blocks that share a tile, besides the bytes: from a store to who polls for it


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU: ops/prefill.cu."""

    codec: Trellis
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    tokens: int  # of a tile of y
    warpgroups: int  # of a block, of 64 rows each
    copies: int  # of the table in shared memory
    stages: int  # units on their way
    blocks: int  # of threads

    @property
    def rows(self) -> int:
        """Of a tile of y."""
        return 64 * self.warpgroups

    @property
    def _stage(self) -> int:
        return 128 * self.tokens + 32 * self.codec.code_bits * self.warpgroups

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block."""
        return table_bytes(self.codec, self.copies) + self.stages * self._stage + _BARRIERS

    @property
    def source(self) -> nvrtc.Source:
        macros = {
            **table_macros(self.codec, self.copies),
            "BF16": int(self.dtype == torch.bfloat16),
            "SCALE": SCALES[self.scale],
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "STAGES": self.stages,
        }
        files = (
            "ops/ptx.cuh",
            "ops/tiles.cuh",
            "ops/slices.cuh",
            "ops/wgmma.cuh",
            "ops/exchange.cuh",
            "ops/prefill.cu",
        )
        return nvrtc.Source(files, tuple(macros.items()), of_one_arch=True)

    def tiles(self, tokens: int, out_features: int) -> int:
        """Of y."""
        return -(-tokens // self.tokens) * -(-out_features // self.rows)

    def shares_tiles(self, tiles: int) -> bool:
        """Whether blocks add up what they have."""
        return tiles % self.blocks > 0

    def unit_cycles(self) -> float:
        """Of a multiprocessor, for one unit: what takes longest."""
        products = 2 * self.tokens * self.warpgroups
        decoding = 64 * _CONFLICTS[self.copies] + 5 * 32 * self.codec.code_bits / _SHARED_BYTES
        reads = 128 * self.tokens * (self.warpgroups + 1) / _SHARED_BYTES + decoding * self.warpgroups
        return max(products, reads, self._stage / _L2, _LEAST)

    def cycles(self, tiles: int, col_tiles: int, multiprocessors: int) -> float:
        """From beginning to end."""
        waves = -(-self.blocks // multiprocessors)
        total = waves * (_START + -(-tiles * col_tiles // self.blocks) * self.unit_cycles())
        if not self.shares_tiles(tiles):
            return total
        taken = -(-self.blocks // tiles) - (self.blocks % tiles == 0)  # parts, which are read and made EMPTY
        return total + _MEETING + (1 + 2 * taken) * 4 * self.rows * self.tokens / _L2


@lru_cache(4096)
def make_plan(
    codec: Trellis,
    dtype: torch.dtype,
    scale: torch.dtype,
    tokens: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
) -> Plan:
    """The one that should take the fewest cycles."""
    col_tiles = -(-in_features // 64)

    def cycles(plan: Plan) -> float:
        return plan.cycles(plan.tiles(tokens, out_features), col_tiles, multiprocessors)

    shapes = [_shape(codec, dtype, scale, *shape) for shape in _SHAPES]
    plans = (p for s in shapes for p in _spread(s, s.tiles(tokens, out_features), col_tiles, multiprocessors))
    return min(plans, key=cycles)


def _shape(codec: Trellis, dtype: torch.dtype, scale: torch.dtype, tokens: int, warpgroups: int) -> Plan:
    """As many copies of the table as leave room for three stages, then as many stages as there is room for."""
    for copies in (32, 16, 8, 4):
        plan = Plan(codec, dtype, scale, tokens, warpgroups, copies, 3, 1)
        if plan.shared <= _SHARED:
            break
    return replace(plan, stages=min(8, 3 + (_SHARED - plan.shared) // plan._stage))


def _spread(plan: Plan, tiles: int, col_tiles: int, multiprocessors: int) -> Iterator[Plan]:
    """With a block for each tile, with several for each, and with one for each multiprocessor; each has a unit."""
    each = max(1, min(multiprocessors // tiles, col_tiles))
    for blocks in (tiles, each * tiles, min(multiprocessors, tiles * col_tiles)):
        yield replace(plan, blocks=blocks)


def matmul(x: Tensor, weight: PackedLinear, gpu: nvrtc.Launcher, plan: Plan | None = None) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in] in fp16 or bf16, on a GPU whose arch is ARCH."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    tokens, in_features = x.shape
    rows = weight.out_features
    plan = plan or make_plan(trellis, x.dtype, weight.scale.dtype, tokens, rows, in_features, gpu.multiprocessors)
    row_tiles, col_tiles, _ = weight.codes.shape
    padded = -(-tokens // plan.tokens) * plan.tokens
    tiles = plan.tiles(tokens, rows)
    assert plan.blocks <= tiles * col_tiles
    slots = plan.blocks if plan.shares_tiles(tiles) else 0
    rotated = rotate_tiles(x, weight.signs, weight.block, padded, True, gpu)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    table, handed = device_table(trellis, x.device, x.dtype), gpu.exchange(slots * plan.rows * plan.tokens)
    tensors = (weight.codes, rotated, table, weight.scale, y, handed)
    sizes = (tokens, padded, rows, row_tiles, col_tiles)
    gpu.launch(plan.source, "prefill", plan.blocks, 128 * plan.warpgroups, plan.shared, *tensors, *sizes)
    return y
