"""The product over experts on an NVIDIA GPU: launches ops/experts.cu."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import Codec, get_codec
from glq.codecs.nested import NestedE8
from glq.codecs.trellis import Trellis
from glq.errors import GlqError
from glq.ops.cuda_decode import max_tokens
from glq.ops.cuda_rotate import TILES, by_warps, rotate_tiles
from glq.ops.cuda_table import HOLE, copies_in, decoder, device_table, macros, spread, table_bytes
from glq.ops.inputs import PLAIN, plain
from glq.ops.pairs import segment_limit, sort_pairs
from glq.packed import PackedExperts

_SORTED_FROM = 513  # pairs: more than a warp of each block should sort; to be measured
_MOST_EXPERTS = 1024  # that it should count
_PAIRS_AN_EXPERT = {
    1: 4,
    2: 12,
    4: 28,
}  # on average, up to which so many times 8 are multiplied at once; to be measured
_MOST_TILES = 4  # that codes other than trellises have registers for
_END_OF_ROWS = 0.4  # what adding up a group of rows takes, in units of a unit; to be measured


@dataclass(frozen=True)
class Task:
    """What is known of a product from shapes alone."""

    pairs: int
    experts: int
    top_k: int
    row_tiles: int
    col_tiles: int

    @classmethod
    def of(cls, weights: PackedExperts, pairs: int, top_k: int) -> "Task":
        """Tiles are of 64 × 64, whatever the codec's are."""
        return cls(pairs, weights.count, top_k, -(-weights.out_features // 64), -(-weights.in_features // 64))


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU: ops/experts.cu."""

    codec: Codec
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    pair_tiles: int  # of 8 pairs of one expert at once
    wr: int  # row tiles of a unit
    wk: int  # column tiles of a unit
    copies: int  # of the table in shared memory
    top_k: int
    sorted: bool  # pairs come in the order of their experts
    block: int = 0  # width of the rotation, in the kernel, for pairs of one token; 0: x comes rotated

    @property
    def at_once(self) -> int:
        """Pairs of a segment."""
        return 8 * self.pair_tiles

    @property
    def warps(self) -> int:
        return self.wr * self.wk

    def limit(self, task: Task) -> int:
        """Segments that there may be."""
        return segment_limit(task.pairs, task.experts, self.at_once)

    def units(self, task: Task) -> int:
        """Of a segment."""
        return -(-task.row_tiles // self.wr) * -(-task.col_tiles // self.wk)

    def cost(self, task: Task, blocks: int) -> float:
        """Of the block that has most to do, in units."""
        segments = min(task.pairs, task.experts) + task.pairs // (2 * self.at_once)
        units = -(-segments * self.units(task) // blocks)
        return units + _END_OF_ROWS * (1 + units / -(-task.col_tiles // self.wk))

    def shared(self, task: Task) -> int:
        """Bytes of shared memory a block."""
        table = table_bytes(self.codec, self.copies)
        return table if spread(self.codec, self.copies) else table + self._sums + self._x(task) + self._lists(task)

    def fits(self, task: Task, gpu: nvrtc.Launcher) -> bool:
        if spread(self.codec, self.copies):
            x, lists = self._x(task), self._lists(task)
            if self._sums > HOLE or (max(x, lists) if self.block else x // 2 + lists) > HOLE:
                return False
        return self.shared(task) + nvrtc.RESERVED <= gpu.shared_memory

    @property
    def _sums(self) -> int:
        """Bytes of what warps add up."""
        return 4 * 64 * 8 * self.warps

    def _x(self, task: Task) -> int:
        """Bytes of x, or of x of two units."""
        return 2 * 64 * task.col_tiles if self.block else 2 * 2 * 72 * self.wk * self.at_once

    def _lists(self, task: Task) -> int:
        """Bytes that ops/pairs.cuh needs."""
        segments = 16 + (8 if self.sorted else 4 + 2 * self.at_once) * self.limit(task)
        return segments if self.sorted else segments + 4 * (task.pairs + task.experts)

    @cached_property
    def source(self) -> nvrtc.Source:
        defined = macros(
            self.codec,
            self.copies,
            self.dtype,
            self.scale,
            NT=self.pair_tiles,
            WR=self.wr,
            WK=self.wk,
            TOP_K=self.top_k,
            SORTED=int(self.sorted),
            BLOCK=self.block,
            INPUT=PLAIN,
        )
        parts = ("hadamard", "input", "exchange", "units", "one_token", "pairs")
        return nvrtc.Source((*decoder(self.codec), *(f"ops/{name}.cuh" for name in parts), "ops/experts.cu"), defined)


@lru_cache(4096)
def make_plan(
    codec: Codec, dtype: torch.dtype, scale: torch.dtype, task: Task, block: int, gpu: nvrtc.Launcher
) -> Plan:
    """As many copies of the table as there is room for; units so that blocks have equally much to do."""
    width = block if task.pairs == task.top_k and by_warps(block) else 0
    average = task.pairs / task.experts
    pair_tiles = next((tiles for tiles, pairs in _PAIRS_AN_EXPERT.items() if average <= pairs), 8)
    pair_tiles = min(pair_tiles, max_tokens(gpu.arch) // 8 if isinstance(codec, Trellis) else _MOST_TILES)
    by_torch = task.pairs >= _SORTED_FROM or task.experts > _MOST_EXPERTS
    few = pair_tiles == 1 or (pair_tiles == 2 and max_tokens(gpu.arch) == 64)  # else 16 warps lack registers,
    few &= not (isinstance(codec, NestedE8) and codec.q == 8)  # and with this code they always do
    shapes = ((2, 8), (4, 4), (1, 16), (2, 4)) if few else ((2, 4), (1, 8), (4, 2))
    for copies in (copies_in(codec, size) for size in (128, 64, 32)):
        plans = [
            Plan(codec, dtype, scale, pair_tiles, wr, wk, copies, task.top_k, by_torch, width) for wr, wk in shapes
        ]
        fitting = [plan for plan in plans if plan.fits(task, gpu)]
        most = max((plan.warps for plan in fitting), default=0)
        if fitting:
            return min(
                (plan for plan in fitting if plan.warps == most), key=lambda plan: plan.cost(task, gpu.multiprocessors)
            )
    raise GlqError(f"the kernel for {task.experts} experts needs more shared memory than this GPU has")


def matmul(
    x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int, gpu: nvrtc.Launcher, plan: Plan | None = None
) -> Tensor:
    """As ops.experts, for x [rows, in] in fp16 or bf16."""
    codec, pairs, rows = get_codec(weights.codec), len(expert_of), weights.out_features
    task = Task.of(weights, pairs, top_k)
    plan = plan or make_plan(codec, x.dtype, weights.scale.dtype, task, weights.block, gpu)
    expert_of = expert_of.contiguous()
    order, by_expert = sort_pairs(expert_of, task.experts) if plan.sorted else (expert_of, expert_of)
    tokens, x = len(x), x.contiguous()
    if not plan.block:
        x = rotate_tiles(plain(x), weights.signs, weights.block, tokens, TILES, gpu)
    y = torch.empty(pairs, rows, dtype=x.dtype, device=x.device)
    grid = min(gpu.multiprocessors, plan.limit(task) * plan.units(task))
    sums = grid * plan.wr * 64 * plan.at_once
    own = torch.empty(sums, dtype=torch.float32, device=x.device)
    table = device_table(codec, plan.copies, x.device, x.dtype)
    tensors = (weights.codes, x, weights.signs, order, by_expert, table, weights.scale, y, gpu.exchange(sums), own)
    words = by_expert.element_size() // 4
    sizes = (words, plan.limit(task), pairs, task.experts, tokens, rows, task.row_tiles, task.col_tiles)
    gpu.launch(plan.source, "experts", grid, 32 * plan.warps, plan.shared(task), *tensors, *sizes)
    return y
