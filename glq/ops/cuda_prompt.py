"""The product with many tokens on a Hopper GPU: launches ops/prompt.cu, for trellis codecs."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import FRAGMENTS, rotate_tiles
from glq.ops.cuda_table import HOLE, copies_in, device_table, macros, spread, table_bytes
from glq.ops.inputs import Input
from glq.packed import PackedLinear

ARCH = 90  # the one that has these instructions
_SMALL = 1 << 25  # weights of a matrix
_SHARED = 227 * 1024  # bytes of shared memory of a block
_BARRIERS = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """Of a block of threads, and of a cluster of them."""

    tokens: int  # of a tile of y
    cluster: int  # blocks with rows side by side


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU: ops/prompt.cu."""

    codec: Trellis
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    shape: Shape
    copies: int  # of the table in shared memory
    stages: int  # units of x on their way
    clusters: int

    rows = 128  # of a tile of y
    threads = 384

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block. The stages lie in the holes of a table that has some."""
        table = table_bytes(self.codec, self.copies)
        return table + _BARRIERS + (0 if spread(self.codec, self.copies) else self.stages * self.shape.tokens * 128)

    @cached_property
    def source(self) -> nvrtc.Source:
        own = {"TOKENS": self.shape.tokens, "CLUSTER": self.shape.cluster, "STAGES": self.stages}
        defined = macros(self.codec, self.copies, self.dtype, self.scale, **own)
        parts = ("ptx", "tiles", "wgmma", "cluster", "output", "exchange", "slots")
        return nvrtc.Source((*(f"ops/{name}.cuh" for name in parts), "ops/prompt.cu"), defined, of_one_arch=True)

    def tiles(self, tokens: int, out_features: int) -> int:
        """Of y, that a cluster has at a time."""
        return -(-tokens // self.shape.tokens) * -(-out_features // (self.rows * self.shape.cluster))


def make_plan(tokens: int, dtype: torch.dtype, weight: PackedLinear, multiprocessors: int) -> Plan:
    """What was fastest on an H100 (docs/decisions.md, "Kernels for many tokens")."""
    codec = get_codec(weight.codec)
    assert isinstance(codec, Trellis)
    return _plan(tokens, dtype, codec, weight.scale.dtype, weight.out_features, weight.in_features, multiprocessors)


@lru_cache(4096)
def _plan(
    tokens: int, dtype: torch.dtype, codec: Trellis, scale: torch.dtype, rows: int, cols: int, multiprocessors: int
) -> Plan:
    few = tokens <= 128 or (tokens <= 256 and rows * cols < _SMALL)
    shape = Shape(128 if few else 256, 2)
    return spread_out(fill(codec, dtype, scale, shape), tokens, rows, cols, multiprocessors)


def fill(codec: Trellis, dtype: torch.dtype, scale: torch.dtype, shape: Shape, clusters: int = 1) -> Plan:
    """As many copies of the table as 128 KB hold, and as many stages as there is room for."""
    copies, stage = copies_in(codec, 128), 128 * shape.tokens
    holes = 3 * (HOLE // stage)
    room = (_SHARED - _BARRIERS - table_bytes(codec, copies)) // stage
    return Plan(codec, dtype, scale, shape, copies, holes if spread(codec, copies) else min(8, room), clusters)


def spread_out(plan: Plan, tokens: int, out_features: int, in_features: int, multiprocessors: int) -> Plan:
    """The same, with as many clusters as the GPU runs at a time, or tiles cut into equal parts if nearly as many."""
    clusters = max(1, multiprocessors // plan.shape.cluster)
    tiles, col_tiles = plan.tiles(tokens, out_features), -(-in_features // 64)
    even = min(clusters // tiles, col_tiles) * tiles
    return replace(plan, clusters=even if even > 0.9 * clusters else min(clusters, tiles * col_tiles))


def matmul(x: Input, weight: PackedLinear, gpu: nvrtc.Launcher, plan: Plan | None = None) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in], on a GPU whose arch is ARCH."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    plan = plan or make_plan(len(x), x.dtype, weight, gpu.multiprocessors)
    tokens, rows = len(x), weight.out_features
    row_tiles, col_tiles, _ = weight.codes.shape
    tiles, blocks = plan.tiles(tokens, rows), plan.clusters * plan.shape.cluster
    assert plan.clusters <= tiles * col_tiles
    padded = -(-tokens // plan.shape.tokens) * plan.shape.tokens
    rotated = rotate_tiles(x, weight.signs, weight.block, padded, FRAGMENTS, gpu)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    slots = blocks if tiles % plan.clusters else 0  # of sums that blocks hand over
    table, handed = device_table(trellis, x.device, x.dtype), gpu.exchange(slots * plan.rows * plan.shape.tokens)
    tensors = (weight.codes, rotated, table, weight.scale, y, handed)
    sizes = (tokens, padded, rows, row_tiles, col_tiles)
    gpu.launch(plan.source, "prompt", blocks, plan.threads, plan.shared, *tensors, *sizes)
    return y
