"""The product over experts with many pairs on a Hopper GPU: launches ops/route.cu and ops/prefill.cu, for trellises."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_prefill import ARCH, Plan, Shape, fill
from glq.ops.cuda_rotate import by_warps, rotate_pairs
from glq.ops.cuda_table import device_table
from glq.ops.pairs import segment_limit
from glq.packed import PackedExperts

_FEW = 12  # pairs an expert, on average, from which this is faster than ops/experts.cu
_TILES = {20: 32, 40: 64}  # up to so many, tiles of so many pairs are the fastest; beyond, of 128
_MOST_EXPERTS = 1024  # that route.cu counts
_CLEARING = 32  # blocks of threads that write zeros for pairs without an expert


def takes(experts: int, block: int, pairs: int, gpu: nvrtc.Launcher) -> bool:
    """Whether this is the way to multiply so many pairs; block: of the rotation."""
    return gpu.arch == ARCH and experts <= _MOST_EXPERTS and by_warps(block) and pairs >= _FEW * experts


@lru_cache(4096)
def make_plan(codec: Trellis, dtype: torch.dtype, scale: torch.dtype, average: float, gpu: nvrtc.Launcher) -> Plan:
    """average: pairs an expert."""
    shape = Shape(next((tokens for most, tokens in _TILES.items() if average <= most), 128), 2, 12)
    return replace(fill(codec, dtype, scale, shape), blocks=gpu.multiprocessors, experts=True)


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
    macros = (("TOKENS", tokens), ("WORDS", expert_of.element_size() // 4), ("BF16", int(x.dtype == torch.bfloat16)))
    route = nvrtc.Source(("ops/ptx.cuh", "ops/route.cu"), macros)
    gpu.launch(route, "route", experts + _CLEARING, 512, 0, expert_of, blocks, slots, y, pairs, experts, rows)
    rotated = rotate_pairs(x, weights.signs, weights.block, blocks, slots, top_k, gpu)
    table, handed = device_table(trellis, device, x.dtype), gpu.exchange(plan.blocks * plan.rows * tokens)
    tensors = (weights.codes, rotated, table, weights.scale, y, handed, blocks, slots)
    sizes = (pairs, most * tokens, rows, row_tiles, col_tiles)
    gpu.launch(plan.source, "prefill", plan.blocks, plan.threads, plan.shared, *tensors, *sizes)
    return y
