"""The best path through a bit-shift trellis that bites its tail: where the time of trellis quantization goes.

A strip's pairs form a circle, which is walked backwards, pair after pair. A step's state is 16 bits: its `own` lowest
bits belong to its pair, the others are the node through which the walk enters; all but as many of the highest as the
next step has own bits are the node through which it leaves. Own bits are the same at every step, or alternate between
two numbers. The path of least squared error to every node is extended step by step (Viterbi). The first time around,
from anywhere, finds the node at which the circle is closed; the second starts and ends there.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from glq import nvrtc

Search = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
_HUGE = 1e30


def best_states(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    """The best state of every pair: x [n, pairs, 2] fp32, values [65536, 2] fp32 of the states → [n, pairs] int64.

    own: bits of the even pairs and of the odd ones; where they differ, the number of pairs is a multiple of 4.
    By CUDA C++ (cuda-core) or numba; where there is neither by `reference`, which is tens of times slower.
    """
    return _search_on(x.device.type)(x, values, own)


@cache
def _search_on(device: str) -> Search:
    if device == "cuda" and nvrtc.available():
        from glq.codecs.viterbi_cuda import search

        return search
    if device == "cpu" and find_spec("numba") is not None:
        from glq.codecs.viterbi_numba import search as search_on_cpu

        return search_on_cpu
    return reference


def reference(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    """What the fast versions compute, with the arguments of best_states."""
    x, own = x.flip(1), own[::-1]  # in the order of the walk
    steps = x.shape[1]
    middle = steps // 2
    start = _walk(x.roll(-middle, 1), values, own, None)[:, steps - middle - 1] & (1 << 16 - own[0]) - 1
    return _walk(x, values, own, start).flip(1)


def _walk(x: Tensor, values: Tensor, own: tuple[int, int], start: Tensor | None) -> Tensor:
    """The best path [n, steps] of states; from and to the nodes `start` [n], or from and to anywhere."""
    n, steps, _ = x.shape
    cost = x.new_zeros(n, 1 << 16 - own[0])
    if start is not None:
        cost.fill_(_HUGE).scatter_(1, start[:, None], 0.0)
    came_from = []
    energy = values.square().sum(1) / 2
    for t in range(steps):
        mine, following = own[t % 2], own[(t + 1) % 2]
        distance = energy - x[:, t] @ values.T
        through = cost.repeat_interleave(1 << mine, 1) + distance
        cost, high = through.view(n, 1 << following, -1).min(1)
        came_from.append(high)
    node = cost.argmin(1) if start is None else start
    states = []
    for t in reversed(range(steps)):
        high = came_from[t].gather(1, node[:, None])[:, 0]
        states.append(high << 16 - own[(t + 1) % 2] | node)
        node = states[-1] >> own[t % 2]
    return torch.stack(states[::-1], 1)
