"""The product over experts with many pairs on a Hopper GPU: launches ops/route.cu and ops/prefill.cu, for trellises."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TypeGuard

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import Codec, get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_prompt import ARCH
from glq.ops.cuda_rotate import by_warps, rotate_pairs
from glq.ops.cuda_table import HOLE, decoder, device_table, macros, spread, table_bytes
from glq.ops.pairs import segment_limit
from glq.packed import PackedExperts

_FEW = 12  # pairs an expert, on average, from which this is faster than ops/experts.cu
_TILES = {20: 32, 40: 64}  # up to so many, tiles of so many pairs are the fastest; beyond, of 128
_MOST_EXPERTS = 1024  # that route.cu counts
_CLEARING = 32  # blocks of threads that write zeros for pairs without an expert
_SHARED = 227 * 1024  # bytes of shared memory of a block
_BARRIERS = 256  # bytes


@dataclass(frozen=True)
class Shape:
    """Of a block of threads."""

    tokens: int  # of a tile of y
    warpgroups: int  # that multiply 64 rows each
    decoders: int  # warps, by fours


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
        )
        parts = ("steps", "wgmma", "output", "exchange", "slots")
        return nvrtc.Source(
            (*decoder(self.codec), *(f"ops/{name}.cuh" for name in parts), "ops/prefill.cu"), defined, of_one_arch=True
        )


def takes(codec: Codec, experts: int, block: int, pairs: int, gpu: nvrtc.Launcher) -> TypeGuard[Trellis]:
    """Whether this is the way to multiply so many pairs; block: of the rotation."""
    return (
        isinstance(codec, Trellis)
        and gpu.arch == ARCH
        and experts <= _MOST_EXPERTS
        and by_warps(block)
        and pairs >= _FEW * experts
    )


@lru_cache(4096)
def make_plan(codec: Trellis, dtype: torch.dtype, scale: torch.dtype, average: float, gpu: nvrtc.Launcher) -> Plan:
    """average: pairs an expert."""
    shape = Shape(next((tokens for most, tokens in _TILES.items() if average <= most), 128), 2, 12)
    return replace(fill(codec, dtype, scale, shape), blocks=gpu.multiprocessors)


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


def matmul(
    x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int, gpu: nvrtc.Launcher, plan: Plan | None = None
) -> Tensor:
    """As ops.experts, for a trellis codec and x [rows, in] in fp16 or bf16, on a GPU whose arch is ARCH."""
    trellis = get_codec(weights.codec)
    assert isinstance(trellis, Trellis)
    experts, row_tiles, col_tiles, _ = weights.codes.shape
    pairs, rows, device = len(expert_of), weights.out_features, x.device
    plan = plan or make_plan(trellis, x.dtype, weights.scale.dtype, pairs / experts, gpu)
    tokens = plan.shape.tokens
    most = segment_limit(pairs, experts, tokens)
    blocks = torch.empty(1 + most, dtype=torch.int32, device=device)
    slots = torch.empty(most * tokens, dtype=torch.int32, device=device)
    y = torch.empty(pairs, rows, dtype=x.dtype, device=device)
    expert_of, x = expert_of.contiguous(), x.contiguous()
    own = (("TOKENS", tokens), ("WORDS", expert_of.element_size() // 4), ("BF16", int(x.dtype == torch.bfloat16)))
    route = nvrtc.Source(("ops/ptx.cuh", "ops/route.cu"), own)
    gpu.launch(route, "route", experts + _CLEARING, 512, 0, expert_of, blocks, slots, y, pairs, experts, rows)
    rotated = rotate_pairs(x, weights.signs, weights.block, blocks, slots, top_k, gpu)
    table, handed = device_table(trellis, plan.copies, device, x.dtype), gpu.exchange(plan.blocks * plan.rows * tokens)
    tensors = (weights.codes, rotated, table, weights.scale, y, handed, blocks, slots)
    sizes = (pairs, most * tokens, rows, row_tiles, col_tiles)
    gpu.launch(plan.source, "prefill", plan.blocks, plan.threads, plan.shared, *tensors, *sizes)
    return y
