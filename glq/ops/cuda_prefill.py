"""The product with many tokens on a Hopper GPU: launches ops/prefill.cu, for trellis codecs."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import SWIZZLED, rotate_tiles
from glq.ops.cuda_table import HOLE, device_table, macros, spread, table_bytes
from glq.ops.inputs import Input
from glq.packed import PackedLinear

ARCH = 90  # the one that has these instructions
_SHARED = 227 * 1024  # bytes of shared memory of a block
_BARRIERS = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """Of a block of threads."""

    tokens: int  # of a tile of y
    warpgroups: int  # that multiply 64 rows each
    decoders: int  # warps, by fours


SHAPE = Shape(128, 2, 12)  # what was fastest on an H100 (docs/decisions.md)


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU: ops/prefill.cu."""

    codec: Trellis
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    shape: Shape
    copies: int  # of the table in shared memory
    stages: int  # units on their way
    blocks: int  # of threads
    experts: bool = False

    @property
    def rows(self) -> int:
        """Of a tile of y."""
        return 64 * self.shape.warpgroups

    @property
    def stage(self) -> int:
        """Bytes."""
        return 128 * (self.shape.tokens + self.rows)

    @property
    def threads(self) -> int:
        return 128 * self.shape.warpgroups + 32 * self.shape.decoders

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block. The stages lie in the holes of a table that has some."""
        table = table_bytes(self.codec, self.copies)
        if not spread(self.codec, self.copies):
            return table + self.stages * self.stage + _BARRIERS
        return table if HOLE % self.stage >= _BARRIERS else table + _BARRIERS

    @cached_property
    def source(self) -> nvrtc.Source:
        defined = macros(
            self.codec,
            self.copies,
            self.dtype,
            self.scale,
            TOKENS=self.shape.tokens,
            WARPGROUPS=self.shape.warpgroups,
            DECODERS=self.shape.decoders,
            STAGES=self.stages,
            EXPERTS=int(self.experts),
        )
        parts = ("ptx", "tiles", "steps", "wgmma", "output", "exchange")
        return nvrtc.Source((*(f"ops/{name}.cuh" for name in parts), "ops/prefill.cu"), defined, of_one_arch=True)

    def tiles(self, tokens: int, out_features: int) -> int:
        """Of y."""
        return -(-tokens // self.shape.tokens) * -(-out_features // self.rows)

    def shares_tiles(self, tiles: int) -> bool:
        """Whether blocks add up what they have."""
        return tiles % self.blocks > 0


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
    """As many blocks for each tile of y as leave few multiprocessors without one."""
    plan = fill(codec, dtype, scale, SHAPE)
    tiles, col_tiles = plan.tiles(tokens, out_features), -(-in_features // 64)
    even = min(multiprocessors // tiles, col_tiles) * tiles
    return replace(plan, blocks=even if even > 0.9 * multiprocessors else min(multiprocessors, tiles * col_tiles))


def fill(codec: Trellis, dtype: torch.dtype, scale: torch.dtype, shape: Shape) -> Plan:
    """As many copies of the table as leave room for three stages, then as many stages as there is room for."""
    for copies in (32, 16, 8, 4):
        plan = Plan(codec, dtype, scale, shape, copies, 3, 1)
        if spread(codec, copies):
            if plan.stage <= HOLE:
                return replace(plan, stages=min(8, 3 * (HOLE // plan.stage)))
        elif plan.shared <= _SHARED:
            break
    return replace(plan, stages=min(8, 3 + (_SHARED - plan.shared) // plan.stage))


def matmul(x: Input, weight: PackedLinear, gpu: nvrtc.Launcher, plan: Plan | None = None) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in], on a GPU whose arch is ARCH."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    tokens, in_features = x.shape
    rows = weight.out_features
    plan = plan or make_plan(trellis, x.dtype, weight.scale.dtype, tokens, rows, in_features, gpu.multiprocessors)
    row_tiles, col_tiles, _ = weight.codes.shape
    padded = -(-tokens // plan.shape.tokens) * plan.shape.tokens
    tiles = plan.tiles(tokens, rows)
    assert plan.blocks <= tiles * col_tiles
    slots = plan.blocks if plan.shares_tiles(tiles) else 0
    rotated = rotate_tiles(x, weight.signs, weight.block, padded, SWIZZLED, gpu)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    table, handed = device_table(trellis, x.device, x.dtype), gpu.exchange(slots * plan.rows * plan.shape.tokens)
    tensors = (weight.codes, rotated, table, weight.scale, y, handed, None, None)
    sizes = (tokens, padded, rows, row_tiles, col_tiles)
    gpu.launch(plan.source, "prefill", plan.blocks, plan.threads, plan.shared, *tensors, *sizes)
    return y
