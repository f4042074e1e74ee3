"""The best path through a bit-shift trellis that bites its tail: where the time of trellis quantization goes.

A strip's pairs form a circle. Going backwards around it, pair after pair, a state is h · 2^(16−k) + node, where the
node's high 16 − 2k bits and h, the k highest bits of the state, come from the node before: that node is
h · 2^(16−2k) + ⌊node / 2^k⌋, and the node's k low bits are the pair's own. The path of least squared error to every
node is extended pair by pair (Viterbi). The first time around, from anywhere, finds the node at which the circle is
closed; the second starts and ends there.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from glq import nvrtc

Search = Callable[[Tensor, Tensor, int], Tensor]
_HUGE = 1e30


def best_states(x: Tensor, values: Tensor, step_bits: int) -> Tensor:
    """x [n, pairs, 2] fp32, values [65536, 2] fp32 of the states → states [n, pairs] int64.

    By CUDA C++ (cuda-core) or numba; where there is neither by `reference`, which is tens of times slower.
    """
    return _search_on(x.device.type)(x.flip(1).contiguous(), values, step_bits).flip(1)


@cache
def _search_on(device: str) -> Search:
    if device == "cuda" and nvrtc.available():
        from glq.codecs.viterbi_cuda import search

        return search
    if device == "cpu" and find_spec("numba") is not None:
        from glq.codecs.viterbi_numba import search as search_on_cpu

        return search_on_cpu
    return reference


def reference(x: Tensor, values: Tensor, step_bits: int) -> Tensor:
    """What the fast versions compute: x [n, steps, 2], in the order of the walk → states [n, steps] int64."""
    steps = x.shape[1]
    middle = steps // 2
    start = _walk(x.roll(-middle, 1), values, step_bits, None)[:, steps - middle - 1] & (1 << 16 - step_bits) - 1
    return _walk(x, values, step_bits, start)


def _walk(x: Tensor, values: Tensor, k: int, start: Tensor | None) -> Tensor:
    """The best path [n, steps] of states; from and to the nodes `start` [n], or from and to anywhere."""
    n, steps, _ = x.shape
    fans, nodes = 1 << k, 1 << 16 - k
    cost = x.new_zeros(n, nodes)
    if start is not None:
        cost.fill_(_HUGE).scatter_(1, start[:, None], 0.0)
    came_from = []
    energy = values.square().sum(1) / 2
    for t in range(steps):
        distance = (energy - x[:, t] @ values.T).view(n, fans, -1, fans)  # [n, h, node's high bits, own bits]
        best, h = (cost.view(n, fans, -1, 1) + distance).min(1)
        cost = best.view(n, nodes)
        came_from.append(h.view(n, nodes))
    node = cost.argmin(1) if start is None else start
    states = []
    for back in reversed(came_from):
        h = back.gather(1, node[:, None])[:, 0]
        states.append(h << 16 - k | node)
        node = h << 16 - 2 * k | node >> k
    return torch.stack(states[::-1], 1)
