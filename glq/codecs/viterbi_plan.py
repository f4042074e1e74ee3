"""How the nodes of a trellis are spread over an NVIDIA GPU: what is compiled and launched."""

from dataclasses import dataclass, replace

from glq import nvrtc

SCALE = 8  # of weights and values
_FAR = 10  # weights beyond count as this


@dataclass(frozen=True)
class Block:
    """How the nodes of one trellis are spread over a block (codecs/viterbi.cu)."""

    own: tuple[int, int]  # bits of even and odd steps of the walk, from the last pair to the first
    strips: int  # a block
    lanes: int  # threads that hold every node once
    groups: int  # of lanes, among which the rows of states are divided
    held: int = 0  # values of two states that a thread keeps in registers, of those that it reads at every step
    kept: int = 0  # the same, in shared memory

    kernel = "viterbi"
    blocks = 1  # of a group of strips

    @property
    def threads(self) -> int:
        return self.lanes * self.groups

    def shared(self, steps: int) -> int:
        """Bytes of shared memory a block."""
        words = (self.groups - 1) * nodes(self.own) // 2 + self.lanes // 32 + steps + 1
        return self.kept * self.threads * 8 + self.strips * (2 * nodes(self.own) + 4 * words)

    @property
    def source(self) -> nvrtc.Source:
        even, odd = self.own
        spread = {"STRIPS": self.strips, "LANES": self.lanes, "GROUPS": self.groups}
        unroll = (1 << odd) // self.groups if self.held else 4  # registers cannot be numbered at run time
        at_hand = {"HELD": self.held, "KEPT": self.kept, "UNROLL": unroll}
        return _source("viterbi.cu", {"K0": even, "K1": odd, **spread, **at_hand})


@dataclass(frozen=True)
class Cluster:
    """How the nodes of one trellis are spread over a cluster of blocks, for one strip (codecs/viterbi_cluster.cu)."""

    own: tuple[int, int]
    blocks: int
    threads: int  # a block

    kernel = "viterbi_cluster"
    strips = 1

    def shared(self, steps: int) -> int:
        """Bytes of shared memory a block."""
        columns = 2 ** (15 - max(self.own)) // self.blocks
        lanes = min(columns, self.threads)
        partial = (self.threads // lanes - 1) * (nodes(self.own) // 2 // self.blocks)
        leasts = 2 * self.blocks * max(1, lanes // 32)
        return 16 + 4 * nodes(self.own) + 4 * (partial + leasts + steps + 1)

    @property
    def source(self) -> nvrtc.Source:
        even, odd = self.own
        values = 2**16 // self.blocks // self.threads  # registers of a thread
        room = min(2, max(1, 2**16 // ((values + 32) * self.threads)))
        spread = {"CLUSTER": self.blocks, "THREADS": self.threads, "ROOM": room}
        return _source("viterbi_cluster.cu", {"K0": even, "K1": odd, **spread})


Plan = Block | Cluster


def _source(kernel: str, macros: dict[str, int]) -> nvrtc.Source:
    files = ("codecs/device.cuh", "codecs/viterbi.cuh", f"codecs/{kernel}")
    return nvrtc.Source(files, tuple({"SCALE": SCALE, "FAR": _FAR, **macros}.items()))


def nodes(own: tuple[int, int]) -> int:
    """Before or after a step, at most."""
    return 1 << 16 - min(own)


# (lanes, groups) by the most own bits, measured on an H100: for few strips, whose blocks are alone on their
# processors, and for many.
_FEW = {3: (512, 1), 4: (512, 2), 5: (256, 2), 6: (256, 4), 7: (256, 4), 8: (128, 8)}
_HELD = 8
# Up to how many strips a processor: blocks of a cluster, and threads of a block, with registers for what they hold.
# Measured on an H200: docs/decisions.md, "Searching the trellis".
_CLUSTERS = ((1 / 16, 8, 256), (3 / 8, 4, 256), (1 / 2, 2, 512), (3 / 4, 4, 256))
_CLUSTERS_WHERE_BLOCKS_ARE_SLOW = (*_CLUSTERS, (2, 2, 512))  # at 4 bits, and where steps differ in bits
_MANY = {3: (256, 1), 4: (256, 1), 5: (256, 1), 6: (256, 2), 7: (256, 2), 8: (128, 2)}


def plan(own: tuple[int, int], strips: int, steps: int, processors: int, memory: int, arch: int) -> Plan:
    """Few strips: a block or several for each, for the sake of time; many: several a block, for that of the L2 cache.

    memory: bytes of shared memory that a block may have. arch: compute capability; there are clusters from 9.0 on.
    """
    narrow, wide = min(own), max(own)
    if arch >= 90:
        for most, blocks, threads in _CLUSTERS if narrow == wide < 8 else _CLUSTERS_WHERE_BLOCKS_ARE_SLOW:
            if strips <= most * processors:
                return Cluster(own, blocks, threads)
    if strips > 8 * processors:
        return Block(own, {3: 2, 4: 4}.get(narrow, 8), *_MANY[wide])
    alone = Block(own, 1, *_FEW[wide])
    if narrow == wide and strips <= 2 * processors:
        room = (memory - alone.shared(steps)) // (8 * alone.threads)
        return replace(alone, held=_HELD, kept=min(2**15 // alone.threads - _HELD, room))
    if strips <= 1.5 * processors:
        return alone
    return replace(alone, strips=2 if narrow == 3 else 4)
