"""Viterbi on a CPU, compiled by numba: the loops of codecs/viterbi.py, vectorized over the nodes."""

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads
from torch import Tensor

_HUGE = np.float32(1e30)


def search(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    """As viterbi.best_states, on the CPU, by as many threads as PyTorch takes."""
    first, second = values.T.contiguous().numpy()
    walked = x.flip(1).contiguous().numpy()
    threads = torch.get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # numba, as it starts, has OpenMP take all processors, and so PyTorch
        torch.set_num_threads(threads)
    states = _search(walked, first, second, (first * first + second * second) / 2, own[::-1])
    return torch.from_numpy(states).long().flip(1)


@njit(fastmath=True, cache=True)
def _extend(best, cost, energy, first, second, x0, x1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """best[j] = min(best[j], cost[j] + distance of state j); its own function, so that it vectorizes."""
    for j in range(best.shape[0]):
        best[j] = min(best[j], cost[j] + (energy[j] - x0 * first[j] - x1 * second[j]))


@njit(fastmath=True, cache=True)
def _extend_all(best, cost, energy, first, second, x0, x1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The same where all of these states come from one node."""
    for j in range(best.shape[0]):
        best[j] = min(best[j], cost + (energy[j] - x0 * first[j] - x1 * second[j]))


@njit(fastmath=True, cache=True)
def _walk(x, first, second, energy, own, shift, start, states):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """One way around the circle, from step `shift`; states[t] of the best path; start < 0: from and to anywhere."""
    steps = x.shape[0]
    most = 1 << 16 - min(own)
    history = np.empty((steps, most), np.float32)
    cost = np.zeros(most, np.float32)
    if start >= 0:
        cost[:] = _HUGE
        cost[start] = 0
    spread = np.empty(most, np.float32)
    best = np.empty(most, np.float32)
    for i in range(steps):
        t = (i + shift) % steps
        history[i] = cost
        mine, following = own[t % 2], own[(t + 1) % 2]
        nodes = 1 << 16 - following
        best[:] = _HUGE
        reached = best[:nodes]
        for row in range(0, 65536, nodes):
            states_of = slice(row, row + nodes)
            if nodes == 1 << mine:
                before = cost[row >> mine]
                _extend_all(reached, before, energy[states_of], first[states_of], second[states_of], x[t, 0], x[t, 1])
            else:
                for a in range(nodes >> mine):
                    spread[a << mine : a + 1 << mine] = cost[(row >> mine) + a]
                _extend(reached, spread, energy[states_of], first[states_of], second[states_of], x[t, 0], x[t, 1])
        cost[:] = best
    node = start if start >= 0 else np.argmin(cost)
    for i in range(steps - 1, -1, -1):
        t = (i + shift) % steps
        mine, nodes = own[t % 2], 1 << 16 - own[(t + 1) % 2]
        least, state = np.float32(np.inf), 0
        for s in range(node, 65536, nodes):
            c = history[i, s >> mine] + (energy[s] - x[t, 0] * first[s] - x[t, 1] * second[s])
            if c < least:
                least, state = c, s
        states[t] = state
        node = state >> mine


@njit(parallel=True, fastmath=True, cache=True)
def _search(x, first, second, energy, own):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    states = np.empty(x.shape[:2], np.int32)
    steps, mask = x.shape[1], (1 << 16 - own[0]) - 1
    for i in prange(x.shape[0]):
        _walk(x[i], first, second, energy, own, steps // 2, -1, states[i])
        _walk(x[i], first, second, energy, own, 0, states[i, steps - 1] & mask, states[i])
    return states
