"""What CUDA kernels decode words of the KV cache with: struct Tables of kv/decode.cuh."""

from functools import cache

import torch
from torch import Tensor

from glq.codecs.e8 import half_table
from glq.codecs.nested import NestedE8
from glq.kv.codec import kv_codec

_TRITS = 2**13


@cache
def device_tables(device: torch.device) -> Tensor:
    """Bytes: base-3 digits of numbers, pairs of β/2 of nested-4 and nested-3, the half table of e8-2, constants."""
    number = torch.arange(_TRITS)
    trits = sum((number // 3**i % 3) << 2 * i for i in range(8))
    parts = [torch.as_tensor(trits).to(torch.uint16), _pairs(4), _pairs(3), half_table(128, torch.device("cpu")).half()]
    parts.append(torch.tensor([1024, 1024, 32, 32, 0, 0, 0, 0], dtype=torch.float16))
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts]).to(device)


def halves_at() -> int:
    """Where the half table begins."""
    return 2 * _TRITS + 2 * 64 * 4


def _pairs(bits: int) -> Tensor:
    """[64, 2]: β/2 of scales i and j at 8 j + i."""
    codec = kv_codec(bits).codec
    assert isinstance(codec, NestedE8)
    halves = (torch.tensor(codec.scales) / 2).half()
    return torch.stack([halves.repeat(8), halves.repeat_interleave(8)], -1)
