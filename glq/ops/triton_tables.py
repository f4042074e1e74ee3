"""What the Triton kernels read besides the weights: decoding tables and Hadamard factors, made once a device."""

import math
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from glq.codecs import Codec, get_codec
from glq.codecs.e8 import FactoredE8, ResidualE8, half_table
from glq.codecs.lattice import constant
from glq.codecs.nested import NestedE8
from glq.codecs.trellis import Trellis, looked_up
from glq.rotation import hadamard, odd_part

_CPU = torch.device("cpu")
_MAX_RIGHT = 64  # of the power of two of a block, in the right factor; the rest goes with the odd part


@dataclass(frozen=True)
class Decoder:
    """A codec's constants for the kernels (triton_decode.py); `constants` are their keyword arguments."""

    FAMILY: str
    CODE_BITS: int
    FIRST: int
    SECOND: int

    @property
    def constants(self) -> dict[str, str | int]:
        return asdict(self)


@cache
def decoder(codec: str) -> Decoder:
    c = get_codec(codec)
    if isinstance(c, Trellis):
        return Decoder("trellis", c.code_bits, c.signs, 0)
    if isinstance(c, NestedE8):
        return Decoder("nested", c.code_bits, c.q, c.low.bit_length() - 1)
    entry_bits = [stage.entries.bit_length() - 1 for stage, _ in _stages(c)]
    return Decoder("e8", c.code_bits, entry_bits[0], sum(entry_bits[1:]))


@cache
def decoding_table(codec: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table of a codec for values in `dtype`.

    trellis: [1024] u32, as trellis.looked_up has them, pairs of bf16 for bf16, otherwise of fp16. e8: u64, pairs of
    fp32, two an entry of a half table.
    nested: [16 + 8192] u32, the bits of β / 2 in fp32, then the low eight base-3 digits of each number, two bits each.
    """
    c = get_codec(codec)
    if isinstance(c, Trellis):
        pairs = looked_up(c, c.signs).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
        table = pairs.contiguous().view(torch.int32).view(-1).view(torch.uint32)
    elif isinstance(c, NestedE8):
        table = _nested_table(c)
    else:
        table = torch.cat([_half_pairs(stage) * gain for stage, gain in _stages(c)])
        table = table.view(torch.int64).view(-1).view(torch.uint64)
    return table.to(device)


@cache
def one_token_table(codec: str, device: torch.device) -> Tensor:
    """The table of a codec for triton_one_token.py.

    trellis: u32 pairs of fp16, where decoding_table lacks the first sign with that, too (trellis.looked_up). e8: u64,
    the four fp16 of an entry of a half table in units of the lattice, for each stage; filled up to a power of two.
    nested: as decoding_table.
    """
    c = get_codec(codec)
    if isinstance(c, Trellis) and c.signs < 2:
        return looked_up(c, c.signs + 1).contiguous().view(torch.int32).view(-1).view(torch.uint32).to(device)
    if isinstance(c, Trellis | NestedE8):
        return decoding_table(codec, torch.float16, device)
    halves = torch.cat([half_table(stage.entries, _CPU) for stage, _ in _stages(c)]).half()
    table = torch.zeros(1 << (len(halves) - 1).bit_length(), 4, dtype=torch.float16)
    table[: len(halves)] = halves
    return table.view(torch.int64).view(-1).view(torch.uint64).to(device)


@cache
def units(codec: str) -> tuple[float, float]:
    """The unit of an E8 code's first lattice in weights, and of its second in the first; 1 for others."""
    c = get_codec(codec)
    if isinstance(c, Trellis | NestedE8):
        return 1.0, 1.0
    stages = _stages(c)
    first, last = stages[0][0].density, stages[-1]
    return 1 / first, last[1] / last[0].density * first


def _stages(codec: Codec) -> list[tuple[FactoredE8, float]]:
    """The factored codes that an E8 codec adds up, and their gains."""
    if isinstance(codec, ResidualE8):
        return [(codec.first, 1.0), (codec.second, codec.gain)]
    if isinstance(codec, FactoredE8):
        return [(codec, 1.0)]
    raise NotImplementedError(f"no Triton kernel decodes {codec.name}")


def _half_pairs(codec: FactoredE8) -> Tensor:
    """[8 · entries, 2] fp32: the values of codes that have the same entry in both halves, of which one half is kept."""
    entry = torch.arange(4 * codec.entries)
    codes = entry * codec.entries + entry % codec.entries
    return codec.decode(codes)[:, :4].reshape(-1, 2).contiguous()


def _nested_table(codec: NestedE8) -> Tensor:
    half_betas = torch.zeros(16)
    half_betas[: len(codec.scales)] = constant(codec.scales, _CPU) / 2
    i = torch.arange(8)
    digits = (torch.arange(8192)[:, None] // 3**i % 3 << 2 * i).sum(1)
    return torch.cat([half_betas.view(torch.int32), digits.to(torch.int32)]).view(torch.uint32)


@dataclass(frozen=True)
class Factors:
    """H of a block, a · p wide, as X [a, p] → left · X · right; both in fp32, padded to multiples of 16."""

    a: int
    p: int
    left: Tensor
    right: Tensor


@cache
def hadamard_factors(block: int, device: torch.device) -> Factors:
    p = min(block // odd_part(block), _MAX_RIGHT)
    a = block // p
    return Factors(a, p, _padded(a).to(device), _padded(p).to(device))


def _padded(n: int) -> Tensor:
    """H of one block of width n: the Kronecker factors of a block's H are such matrices themselves."""
    h = torch.zeros(math.ceil(n / 16) * 16, math.ceil(n / 16) * 16)
    h[:n, :n] = hadamard(torch.eye(n, dtype=torch.float64), n)
    return h


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of threads a device runs side by side; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
