"""The product with many tokens on a Hopper GPU: launches ops/prompt.cu, for all codecs but nested ones."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from glq import nvrtc
from glq.codecs import Codec, get_codec
from glq.codecs.e8 import ResidualE8
from glq.codecs.nested import NestedE8
from glq.ops.cuda_rotate import FRAGMENTS, by_warps, rotation
from glq.ops.cuda_table import HOLE, copies_in, decoder, device_table, macros, spread, table_bytes
from glq.ops.cuda_tiled import Launch, Product
from glq.ops.inputs import NORM
from glq.ops.matrix import Matrix

ARCH = 90  # the one that has these instructions
MOST, _MOST_RESIDUAL = 4096, 1024  # tokens, with one look-up a pair and with two
FEW = 256  # tokens up to which a small matrix has tiles of 128
_SMALL = 1 << 25  # weights of one
_WIDE = 10240  # columns from which tokens are rotated beside the product of others
_SHARED = 227 * 1024  # bytes of shared memory of a block
_BARRIERS = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """Of a block of threads, and of a cluster of them."""

    tokens: int  # of a tile of y
    cluster: int  # blocks with rows side by side


_SOME, _MANY = Shape(128, 2), Shape(256, 2)


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU: ops/prompt.cu."""

    codec: Codec
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
        parts = ("wgmma", "cluster", "output", "exchange", "slots", "quarters")
        return nvrtc.Source(
            (*decoder(self.codec), *(f"ops/{name}.cuh" for name in parts), "ops/prompt.cu"), defined, of_one_arch=True
        )

    def tiles(self, tokens: int, out_features: int) -> int:
        """Of y, that a cluster has at a time."""
        return -(-tokens // self.shape.tokens) * -(-out_features // (self.rows * self.shape.cluster))


def most_tokens(codec: Codec) -> int:
    """Up to how many this is faster than dequantizing. Nested codes take longer to decode than their products."""
    return 0 if isinstance(codec, NestedE8) else _MOST_RESIDUAL if isinstance(codec, ResidualE8) else MOST


def make_plan(tokens: int, dtype: torch.dtype, matrix: Matrix, multiprocessors: int) -> Plan:
    """What was fastest on an H100 (docs/decisions.md, "Kernels for many tokens"), for a codec that this takes."""
    few = tokens <= 128 or (tokens <= FEW and matrix.rows * matrix.cols < _SMALL)
    plan = fill(get_codec(matrix.codec), dtype, matrix.scale, _SOME if few else _MANY)
    return spread_out(plan, tokens, matrix, multiprocessors)


def fill(codec: Codec, dtype: torch.dtype, scale: torch.dtype, shape: Shape, clusters: int = 1) -> Plan:
    """As many copies of the table as 128 KB hold, and as many stages as there is room for."""
    copies, stage = copies_in(codec, 128), 128 * shape.tokens
    holes = 3 * (HOLE // stage)
    room = (_SHARED - _BARRIERS - table_bytes(codec, copies)) // stage
    return Plan(codec, dtype, scale, shape, copies, holes if spread(codec, copies) else min(8, room), clusters)


def spread_out(plan: Plan, tokens: int, matrix: Matrix, multiprocessors: int) -> Plan:
    """The same, with as many clusters as the GPU runs at a time.

    With nearly as many, if each then has whole tiles, or an equal part of one: nothing is handed over that is not
    needed, and those that have the same tokens read the same part of x at the same time.
    """
    clusters = max(1, multiprocessors // plan.shape.cluster)
    tiles, col_tiles = plan.tiles(tokens, matrix.rows), matrix.tiles[1]
    if tiles <= clusters:
        even = min(clusters // tiles, col_tiles) * tiles
    else:
        turns = -(-tiles // clusters)
        even = tiles // turns if tiles % turns == 0 else 0
    return replace(plan, clusters=even if even > 0.9 * clusters else min(clusters, tiles * col_tiles))


def tokens_at_once(tokens: int, kind: int, matrix: Matrix, multiprocessors: int) -> int:
    """All, or those of a part of the product, beside which those of the next one are rotated.

    Where x is wide, so that this takes long, and as many as make a whole tile for nearly all clusters: then the few
    multiprocessors that have none rotate.
    """
    clusters = multiprocessors // _MANY.cluster
    rows = -(-matrix.rows // (Plan.rows * _MANY.cluster))  # tiles of a cluster, of all rows
    blocks = clusters // rows
    rotates = kind != NORM and matrix.cols >= _WIDE and by_warps(matrix.block)
    return blocks * _MANY.tokens if rotates and blocks * rows > 0.9 * clusters else tokens


def make_product(
    plan: Plan, tokens: int, kind: int, matrix: Matrix, device: torch.device, gpu: nvrtc.Launcher
) -> Product:
    """For x of that kind, on a GPU whose arch is ARCH."""
    tiles, (row_tiles, col_tiles) = plan.tiles(tokens, matrix.rows), matrix.tiles
    assert plan.clusters <= tiles * col_tiles < (1 << 32) // plan.clusters  # that it multiplies in 32 bits
    blocks = plan.clusters * plan.shape.cluster
    padded = -(-tokens // plan.shape.tokens) * plan.shape.tokens
    sums = (blocks if tiles % plan.clusters else 0) * plan.rows * plan.shape.tokens
    sizes = (tokens, padded, matrix.rows, row_tiles, col_tiles)
    return Product(
        rotation(tokens, kind, plan.dtype, matrix.cols, matrix.block, padded, FRAGMENTS, gpu),
        device_table(plan.codec, plan.copies, device, plan.dtype),
        (Launch(plan.source, "prompt", blocks, plan.threads, plan.shared, sums, sizes),),
        gpu,
    )
