"""Viterbi on an NVIDIA GPU: launches codecs/viterbi.cu."""

from dataclasses import dataclass
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

    step_bits: int
    strips: int  # a block
    pairs: int  # of nodes a thread
    groups: int  # of threads, among which the fans are divided

    @property
    def nodes(self) -> int:
        return 1 << 16 - self.step_bits

    @property
    def threads(self) -> int:
        return self.nodes // 2 // self.pairs * self.groups

    def shared(self, steps: int) -> int:
        """Bytes of shared memory a block."""
        warps = self.threads // self.groups // 32
        words = (self.groups - 1) * self.nodes // 2 + warps + steps + 1
        return self.strips * (2 * self.nodes + 4 * words)

    @property
    def source(self) -> nvrtc.Source:
        macros = {"K": self.step_bits, "STRIPS": self.strips, "PAIRS": self.pairs, "GROUPS": self.groups, "UNROLL": 4}
        return nvrtc.Source("codecs/viterbi.cu", tuple(macros.items()))


# (pairs a thread, groups) by step_bits, measured on an H100: for few strips, whose blocks are alone on their
# processors, and for many.
_FEW = {3: (8, 1), 4: (4, 2), 5: (4, 2), 6: (2, 4), 7: (1, 4), 8: (1, 8)}
_MANY = {3: (16, 1), 4: (8, 1), 5: (4, 1), 6: (2, 2), 7: (1, 2), 8: (1, 2)}


def plan(step_bits: int, strips: int, processors: int) -> Plan:
    """Few strips: a block for each, for the sake of time; many: several a block, for the sake of the L2 cache."""
    if strips <= 1.5 * processors:
        return Plan(step_bits, 1, *_FEW[step_bits])
    if strips <= 6 * processors:
        return Plan(step_bits, 2 if step_bits == 3 else 4, *_FEW[step_bits])
    return Plan(step_bits, {3: 2, 4: 4}.get(step_bits, 8), *_MANY[step_bits])


def search(x: Tensor, values: Tensor, step_bits: int) -> Tensor:
    """As viterbi.reference, up to ties and the rounding of costs: x [n, steps, 2] → states [n, steps] int64."""
    n, steps, _ = x.shape
    most = max(8, _HISTORY // (steps * 2 << 16 - step_bits))
    return (
        torch.cat([_search(part, values, step_bits) for part in x.split(most)]) if n else x.new_empty(0, steps).long()
    )


def _search(x: Tensor, values: Tensor, step_bits: int) -> Tensor:
    n, steps, _ = x.shape
    p = plan(step_bits, n, torch.cuda.get_device_properties(x.device).multi_processor_count)
    blocks = -(-n // p.strips)
    scaled = (x.clamp(-_FAR, _FAR) * _SCALE).half()
    scaled = pad(scaled, (0, 0, 0, 0, 0, blocks * p.strips - n))
    first, second = _scaled_values(values)
    history = torch.empty(blocks * p.strips, steps, p.nodes, dtype=torch.float16, device=x.device)
    states = torch.empty(blocks * p.strips, steps, dtype=torch.int32, device=x.device)
    shared = p.shared(steps)
    loaded = nvrtc.kernel(p.source, "viterbi", x.device, shared)
    nvrtc.launch(loaded, blocks, p.threads, shared, scaled, first, second, history, states, steps)
    return states[:n].long()


@cache
def _scaled_values(values: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (values * _SCALE).half().T.contiguous()
    return first, second
