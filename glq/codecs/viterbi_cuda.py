"""Viterbi on an NVIDIA GPU: launches codecs/viterbi.cu or codecs/viterbi_cluster.cu."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from glq import nvrtc
from glq.codecs.viterbi_plan import SCALE, Plan, nodes, plan

_HISTORY = 2**30  # bytes of scratch at once


def search(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    """As viterbi.best_states, up to ties and the rounding of costs."""
    n, steps, _ = x.shape
    gpu = nvrtc.gpu(x.device)
    memory = gpu.shared_memory - nvrtc.RESERVED
    most = max(8, _HISTORY // (steps * 2 * nodes(own)))
    done = [x.new_empty(0, steps, dtype=torch.int64)]
    for part in x.split(most) if n else []:
        p = plan(own[::-1], len(part), steps, gpu.multiprocessors, memory, gpu.arch)
        done.append(run(part, values, p, gpu))
    return done[1] if len(done) == 2 else torch.cat(done)


def run(x: Tensor, values: Tensor, p: Plan, gpu: nvrtc.Launcher) -> Tensor:
    """`search` by this plan: every one finds the same states."""
    n, steps, _ = x.shape
    blocks = -(-n // p.strips)
    filled = blocks * p.strips
    if filled > n:
        x = pad(x, (0, 0, 0, 0, 0, filled - n))
    history = torch.empty(filled, steps, nodes(p.own), dtype=torch.float16, device=x.device)
    states = torch.empty(filled, steps, dtype=torch.int64, device=x.device)
    arguments = (x.float().contiguous(), *_scaled_values(values, max(p.own)), history, states, steps)
    gpu.launch(p.source, p.kernel, blocks * p.blocks, p.threads, p.shared(steps), *arguments)
    return states[:n]


@cache
def _scaled_values(values: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first values of all states, the second ones, and pairs of both, [lowest 16 - most bits][highest most]."""
    scaled = (values * SCALE).half()
    first, second = scaled.T.contiguous()
    return first, second, scaled.view(1 << most, -1, 2).transpose(0, 1).contiguous()
