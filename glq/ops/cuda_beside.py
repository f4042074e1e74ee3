"""What of x is rotated ahead of a product on Hopper, and what beside it: ops/ahead.cu, ops/beside.cuh."""

from dataclasses import dataclass
from math import gcd

import torch

from glq import nvrtc
from glq.ops.cuda_rotate import FRAGMENTS, ROW_THREADS, ROWS_SOURCE, Rotation, by_warps, grid_of_rows, macros

TOKENS = 256  # of a block of them
_UNIT = 1071  # cycles of a unit of the product
_AHEAD = 0.62  # … and until the whole GPU has rotated 256 columns of a token
_BESIDE = 27  # … and until a multiprocessor has
_SEEN = 25_000  # … and from when what is left of a step is begun until it is seen
_MOST_SLICES = 14  # whose order two numbers of 28 bits say
_RING = 4  # tokens on their way to a warp


@dataclass(frozen=True)
class Schedule:
    """Of a product whose units are cut into equal runs, of whole tiles or of equal parts of one."""

    tokens: int
    block: int  # columns of a block of the rotation
    order: tuple[int, ...]  # of these blocks
    apart: int  # blocks of tokens that are wanted with the same tile of a run
    ahead: int  # of all blocks of columns of blocks of tokens
    early: int  # units of each run that want nothing else
    beside: int  # blocks of threads that rotate what is left

    @property
    def _order(self) -> tuple[int, int]:
        low, high = (sum(block << 4 * i for i, block in enumerate(part)) for part in (self.order[:7], self.order[7:]))
        return low, high

    @property
    def sizes(self) -> tuple[int, ...]:
        """The last arguments of prompt.cu."""
        return self.beside, self.apart, *self._order, self.ahead, self.early

    def rotation(self, dtype: torch.dtype, held: int, gpu: nvrtc.Launcher) -> Rotation:
        """x [tokens, in] → [column tiles · held · 64] of which what is ahead is there, and counts."""
        cols, blocks = len(self.order) * self.block, -(-self.tokens // TOKENS)
        sizes = (held, cols, self.tokens, self.apart, *self._order, self.ahead)
        counts = 2 * len(self.order) * blocks  # in units of 16 bits
        each = blocks // self.apart
        grid = grid_of_rows(min(each, self.ahead) * TOKENS, -(-self.ahead // each), self.block, gpu)
        files = (*ROWS_SOURCE, "ops/schedule.cuh", "ops/ahead.cu")
        source = nvrtc.Source(files, macros(dtype, self.block, FRAGMENTS))
        return Rotation(source, "rotate_ahead", grid, ROW_THREADS, 0, (cols * held + counts,), sizes, 0, gpu)


NONE = (0, 1, 0, 0, 0, (1 << 31) - 1)  # sizes where all of x is there


def shared_bytes(block: int, threads: int) -> int:
    """That a block of threads takes which rotates x: a ring for each warp."""
    return threads // 32 * _RING * (2 * block + 16)


def make_schedule(tokens: int, cols: int, block: int, tiles: int, runs: int, beside: int) -> Schedule | None:
    """For tiles of TOKENS tokens in so many runs, and `beside` blocks of threads; None: it gains nothing."""
    if beside < 1 or not by_warps(block) or cols // block > _MOST_SLICES or (tiles % runs and runs % tiles):
        return None
    units, blocks = cols // 64, -(-tokens // TOKENS)
    apart = gcd(max(1, tiles // runs), blocks)
    wanted = _first_wanted(units, block // 64, max(1, runs // tiles))
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    items = [turn * units + wanted[i] for turn in range(apart) for i in order for _ in range(blocks // apart)]

    def takes(ahead: int) -> float:
        """Cycles until the product begins, and of the longest wait in it."""
        late = (i * beside_takes + _SEEN - first * _UNIT for i, first in enumerate(items[ahead:], start=1))
        return ahead * chunks * _AHEAD + max(0, max(late, default=0))

    chunks = TOKENS * block // 256
    beside_takes = chunks * _BESIDE / beside
    ahead = min(range(items.count(0), len(items) + 1), key=takes)
    return None if ahead == len(items) else Schedule(tokens, block, tuple(order), apart, ahead, items[ahead], beside)


def _first_wanted(units: int, length: int, parts: int) -> list[int]:
    """For each `length` units of a tile: the first unit of a run that wants one, where a tile is so many runs."""
    begins = [units * part // parts for part in range(parts)]
    return [min(max(0, i - begin) for begin in begins if begin < i + length) for i in range(0, units, length)]
