"""Viterbi on an NVIDIA GPU: launches codecs/viterbi.cu or codecs/viterbi_cluster.cu."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from glq import nvrtc
from glq.codecs.viterbi_plan import Plan, nodes, plan

_SCALE = 8.0  # of weights and values: squares of differences of 1/1000 are still normal halves
_FAR = 10.0  # weights beyond count as this, so that no square overflows
_HISTORY = 2**30  # bytes of scratch at once


def search(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    """As viterbi.reference, up to ties and the rounding of costs: x [n, steps, 2] → states [n, steps] int64."""
    n, steps, _ = x.shape
    gpu = nvrtc.gpu(x.device)
    most = max(8, _HISTORY // (steps * 2 * nodes(own)))
    done = []
    for part in x.split(most) if n else []:
        memory = gpu.shared_memory - nvrtc.RESERVED
        p = plan(own, len(part), steps, gpu.multiprocessors, memory, gpu.arch)
        done.append(run(part, values, p, gpu))
    return torch.cat(done) if n else x.new_empty(0, steps).long()


def run(x: Tensor, values: Tensor, p: Plan, gpu: nvrtc.Launcher) -> Tensor:
    """`search` by this plan: every one finds the same states."""
    n, steps, _ = x.shape
    blocks = -(-n // p.strips)
    scaled = (x.clamp(-_FAR, _FAR) * _SCALE).half()
    scaled = pad(scaled, (0, 0, 0, 0, 0, blocks * p.strips - n))
    history = torch.empty(blocks * p.strips, steps, nodes(p.own), dtype=torch.float16, device=x.device)
    states = torch.empty(blocks * p.strips, steps, dtype=torch.int32, device=x.device)
    arguments = (scaled, *_scaled_values(values, max(p.own)), history, states, steps)
    gpu.launch(p.source, p.kernel, blocks * p.blocks, p.threads, p.shared(steps), *arguments)
    return states[:n].long()


@cache
def _scaled_values(values: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first values of all states, the second ones, and pairs of both, [lowest 16 - most bits][highest most]."""
    scaled = (values * _SCALE).half()
    first, second = scaled.T.contiguous()
    return first, second, scaled.view(1 << most, -1, 2).transpose(0, 1).contiguous()
