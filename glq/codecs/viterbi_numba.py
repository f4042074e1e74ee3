"""Viterbi on a CPU, compiled by numba: the loops of codecs/viterbi.py, vectorized over the nodes."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

_HUGE = np.float32(1e30)


def search(x: Tensor, values: Tensor, step_bits: int) -> Tensor:
    """As viterbi.reference: x [n, steps, 2] fp32 on the CPU → states [n, steps] int64."""
    fans = 1 << step_bits
    first, second = values.T.reshape(2, fans, -1).contiguous().numpy()
    states = _search(x.numpy(), first, second, (first * first + second * second) / 2)
    return torch.from_numpy(states).long()


@njit(fastmath=True, cache=True)
def _extend(best, cost, energy, first, second, x0, x1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """best[j] = min(best[j], cost[j] + distance of the states of row j); its own function, so that it vectorizes."""
    for j in range(best.shape[0]):
        best[j] = min(best[j], cost[j] + (energy[j] - x0 * first[j] - x1 * second[j]))


@njit(fastmath=True, cache=True)
def _extend_all(best, cost, energy, first, second, x0, x1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The same where all of a row come from one node."""
    for j in range(best.shape[0]):
        best[j] = min(best[j], cost + (energy[j] - x0 * first[j] - x1 * second[j]))


@njit(fastmath=True, cache=True)
def _walk(x, first, second, energy, shift, start, states):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """One way around the circle, from step `shift`; states[t] of the best path; start < 0: from and to anywhere."""
    steps = x.shape[0]
    fans, nodes = energy.shape
    high = nodes // fans
    history = np.empty((steps, nodes), np.float32)
    cost = np.zeros(nodes, np.float32)
    if start >= 0:
        cost[:] = _HUGE
        cost[start] = 0
    spread = np.empty(nodes, np.float32)
    best = np.empty(nodes, np.float32)
    for i in range(steps):
        t = (i + shift) % steps
        history[i] = cost
        best[:] = _HUGE
        for h in range(fans):
            if high == 1:
                _extend_all(best, cost[h], energy[h], first[h], second[h], x[t, 0], x[t, 1])
            else:
                for a in range(high):
                    spread[a * fans : (a + 1) * fans] = cost[h * high + a]
                _extend(best, spread, energy[h], first[h], second[h], x[t, 0], x[t, 1])
        cost[:] = best
    node = start if start >= 0 else np.argmin(cost)
    for i in range(steps - 1, -1, -1):
        t = (i + shift) % steps
        least, h_best = np.float32(np.inf), 0
        for h in range(fans):
            c = history[i, h * high + node // fans]
            c += energy[h, node] - x[t, 0] * first[h, node] - x[t, 1] * second[h, node]
            if c < least:
                least, h_best = c, h
        states[t] = h_best * nodes + node
        node = h_best * high + node // fans


@njit(parallel=True, fastmath=True, cache=True)
def _search(x, first, second, energy):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    states = np.empty(x.shape[:2], np.int32)
    steps, nodes = x.shape[1], energy.shape[1]
    for i in prange(x.shape[0]):
        _walk(x[i], first, second, energy, steps // 2, -1, states[i])
        _walk(x[i], first, second, energy, 0, states[i, steps - 1] % nodes, states[i])
    return states
