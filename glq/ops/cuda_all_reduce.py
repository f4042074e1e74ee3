"""The sum of a tensor over a few GPUs of one host, by one kernel: launches ops/all_reduce.cu.

Tensor-parallel layers of a decoding step add up a few kilobytes: what counts is how long the first byte takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq import nvrtc

_THREADS, _TURNS = 128, 3  # as in all_reduce.cu
_SENT = 1 << 20  # bytes that a rank sends at most: beyond, each should add up a share, and no part is sent to all
_VECTOR = 16  # bytes that a thread has
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Inboxes:
    """Memory of all ranks in which they send each other what is added up, as one of them sees it."""

    rank: int
    addresses: Tensor  # [ranks] int64, on the rank's own GPU: of inbox_bytes each, which reaches all of them
    turns: Tensor  # [blocks] int32, zeros at first

    @property
    def ranks(self) -> int:
        return len(self.addresses)


def capacity(ranks: int) -> int:
    """Bytes of a tensor at most."""
    return _SENT // (ranks - 1) // (_THREADS * _VECTOR) * _THREADS * _VECTOR


def inbox_bytes(ranks: int) -> int:
    """Of an inbox, all ones at first."""
    return _TURNS * ranks * capacity(ranks)


def make_inboxes(rank: int, addresses: list[int], device: torch.device) -> Inboxes:
    """addresses: of each rank's inbox, as this rank's GPU, `device`, reaches it."""
    turns = torch.zeros(capacity(len(addresses)) // (_THREADS * _VECTOR), dtype=torch.int32, device=device)
    return Inboxes(rank, torch.tensor(addresses, dtype=torch.int64, device=device), turns)


def takes(x: Tensor, ranks: int) -> bool:
    """Whether the kernel adds up such tensors."""
    fits = x.dtype in _DTYPES and 0 < x.nbytes <= capacity(ranks) and x.nbytes % _VECTOR == 0
    return fits and x.is_contiguous() and x.data_ptr() % _VECTOR == 0


def source(dtype: torch.dtype, ranks: int) -> nvrtc.Source:
    macros = {"BF16": int(dtype == torch.bfloat16), "RANKS": ranks}
    return nvrtc.Source(("ops/ptx.cuh", "ops/exchange.cuh", "ops/all_reduce.cu"), tuple(macros.items()))


def all_reduce(x: Tensor, inboxes: Inboxes, gpu: nvrtc.Launcher) -> Tensor:
    """x summed over the ranks, of which each calls it with an x of the same shape and dtype: all get the same bits.

    Calls of a rank come one after the other, on one stream or in one graph at a time. takes(x, inboxes.ranks) is true.
    """
    y, vectors = torch.empty_like(x), x.nbytes // _VECTOR
    sizes = (inboxes.rank, vectors, capacity(inboxes.ranks) // _VECTOR)
    tensors = (x, y, inboxes.addresses, inboxes.turns)
    gpu.launch(source(x.dtype, inboxes.ranks), "all_reduce", -(-vectors // _THREADS), _THREADS, 0, *tensors, *sizes)
    return y
