"""Viterbi on an NVIDIA GPU: launches codecs/viterbi.cu."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from glq import nvrtc

_SCALE = 8.0  # of weights and values: squares of differences of 1/1000 are still normal halves
_FAR = 10.0  # weights beyond count as this, so that no square overflows
_HISTORY = 2**30  # bytes of scratch at once


@dataclass(frozen=True)
class Plan:
    """How the nodes of one trellis are spread over a block."""

    own: tuple[int, int]  # bits of even and odd steps
    strips: int  # a block
    lanes: int  # threads that hold every node once
    groups: int  # of lanes, among which the rows of states are divided
    held: int = 0  # values of two states that a thread keeps in registers, of those that it reads at every step
    kept: int = 0  # the same, in shared memory

    @property
    def nodes(self) -> int:
        return 1 << 16 - min(self.own)

    @property
    def threads(self) -> int:
        return self.lanes * self.groups

    def shared(self, steps: int) -> int:
        """Bytes of shared memory a block."""
        words = (self.groups - 1) * self.nodes // 2 + self.lanes // 32 + steps + 1
        return self.kept * self.threads * 8 + self.strips * (2 * self.nodes + 4 * words)

    @property
    def source(self) -> nvrtc.Source:
        even, odd = self.own
        spread = {"STRIPS": self.strips, "LANES": self.lanes, "GROUPS": self.groups}
        unroll = (1 << odd) // self.groups if self.held else 4  # registers cannot be numbered at run time
        at_hand = {"HELD": self.held, "KEPT": self.kept, "UNROLL": unroll}
        return nvrtc.Source(("codecs/viterbi.cu",), tuple({"K0": even, "K1": odd, **spread, **at_hand}.items()))


# (lanes, groups) by the most own bits, measured on an H100: for few strips, whose blocks are alone on their
# processors, and for many.
_FEW = {3: (512, 1), 4: (512, 2), 5: (256, 2), 6: (256, 4), 7: (256, 4), 8: (128, 8)}
_HELD = 8
_MANY = {3: (256, 1), 4: (256, 1), 5: (256, 1), 6: (256, 2), 7: (256, 2), 8: (128, 2)}


def plan(own: tuple[int, int], strips: int, steps: int, processors: int, memory: int) -> Plan:
    """Few strips: a block for each, for the sake of time; many: several a block, for the sake of the L2 cache.

    memory: bytes of shared memory that a block may have.
    """
    least, most = min(own), max(own)
    if strips > 8 * processors:
        return Plan(own, {3: 2, 4: 4}.get(least, 8), *_MANY[most])
    alone = Plan(own, 1, *_FEW[most])
    if least == most and strips <= 2 * processors:
        room = (memory - alone.shared(steps)) // (8 * alone.threads)
        return replace(alone, held=_HELD, kept=min(2**15 // alone.threads - _HELD, room))
    if strips <= 1.5 * processors:
        return alone
    return replace(alone, strips=2 if least == 3 else 4)


def search(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    """As viterbi.reference, up to ties and the rounding of costs: x [n, steps, 2] → states [n, steps] int64."""
    n, steps, _ = x.shape
    most = max(8, _HISTORY // (steps * 2 << 16 - min(own)))
    return torch.cat([_search(part, values, own) for part in x.split(most)]) if n else x.new_empty(0, steps).long()


def _search(x: Tensor, values: Tensor, own: tuple[int, int]) -> Tensor:
    n, steps, _ = x.shape
    gpu = nvrtc.gpu(x.device)
    p = plan(own, n, steps, gpu.multiprocessors, gpu.shared_memory - nvrtc.RESERVED)
    blocks = -(-n // p.strips)
    scaled = (x.clamp(-_FAR, _FAR) * _SCALE).half()
    scaled = pad(scaled, (0, 0, 0, 0, 0, blocks * p.strips - n))
    first, second = _scaled_values(values)
    history = torch.empty(blocks * p.strips, steps, p.nodes, dtype=torch.float16, device=x.device)
    states = torch.empty(blocks * p.strips, steps, dtype=torch.int32, device=x.device)
    arguments = (scaled, first, second, history, states, steps)
    gpu.launch(p.source, "viterbi", blocks, p.threads, p.shared(steps), *arguments)
    return states[:n].long()


@cache
def _scaled_values(values: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (values * _SCALE).half().T.contiguous()
    return first, second
