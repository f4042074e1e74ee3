"""What CUDA kernels decode words of the KV cache with: struct Tables of kv/decode.cuh."""

from functools import cache

import torch
from torch import Tensor

from glq.codecs.e8 import half_table
from glq.kv.codec import kv_codec
from glq.kv.shaped import ShapedE8

_OPS = ("ptx", "hadamard", "half2", "half_bits")
FILES = (
    *(f"ops/{name}.cuh" for name in _OPS),
    "kv/mix.cuh",
    "kv/decode.cuh",
)  # that come before a kernel which decodes
# of each number of bits: entries, bits of an entry's number that are indices of words a and b, lowest first, free ones
_ADDRESSES = {4: (1376, (2, 6, 10), (0, 4, 8), (1, 3)), 3: (224, (1, 4, 7), (0, 3, 6), (2,))}


@cache
def device_tables(device: torch.device) -> Tensor:
    """Bytes: steps of two words of 4 bits a channel, of 3, the half table of e8-2."""
    parts = [_pairs(4), _pairs(3), half_table(128, torch.device("cpu")).half()]
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts]).to(device)


def halves_at() -> int:
    """Where the half table begins."""
    return sum(4 * _ADDRESSES[bits][0] for bits in (4, 3))


def _pairs(bits: int) -> Tensor:
    """[entries, 2] fp16: steps of words a and b, in units of 1/512, where their indices say; the same in all copies."""
    codec = kv_codec(bits).codec
    assert isinstance(codec, ShapedE8)
    entries, of_a, of_b, copies = _ADDRESSES[bits]
    address = torch.arange(entries)[:, None]
    used = sum(1 << i for i in (*of_a, *of_b, *copies))
    steps = torch.tensor(codec.steps).half()
    a, b = (sum(((address >> i & 1) << n for n, i in enumerate(of)), torch.zeros_like(address)) for of in (of_a, of_b))
    return torch.where(address & ~used == 0, steps[torch.cat([a, b], -1)], 0)
