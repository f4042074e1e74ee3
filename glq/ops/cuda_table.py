"""What CUDA kernels need of a codec: files, macros, and a table that they copy to shared memory."""

from functools import cache

import torch
from torch import Tensor

from glq.codecs import Codec
from glq.codecs.e8 import FactoredE8, ResidualE8, half_table
from glq.codecs.lattice import constant
from glq.codecs.nested import NestedE8
from glq.codecs.trellis import Trellis, looked_up

HOLE = 32 * 1024  # bytes
_SCALES = {torch.float16: 16, torch.bfloat16: 0, torch.float32: 32}  # macro SCALE
_CPU = torch.device("cpu")
_NUMBERS = 102  # that the upper half of the high digits of a nested code may be
_TRELLIS = ("ops/ptx.cuh", "ops/codes.cuh", "ops/tiles.cuh")
_LATTICE = ("ops/ptx.cuh", "ops/half2.cuh", "ops/half_bits.cuh", "ops/codes.cuh", "ops/lattice.cuh")


def decoder(codec: Codec) -> tuple[str, ...]:
    """The files by which a kernel decodes: they come before all others."""
    return _TRELLIS if isinstance(codec, Trellis) else _LATTICE


@cache
def device_table(codec: Codec, copies: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of values in `dtype`, for a kernel with so many copies.

    trellis: [2^(table_bits + signs_in), 2]; e8: [entries, 4]; nested: bytes, as lattice.cuh has them.
    """
    if isinstance(codec, Trellis):
        table = looked_up(codec, signs_in(codec, copies))
    elif isinstance(codec, NestedE8):
        scales = torch.zeros(32)
        scales[: len(codec.scales)] = constant(codec.scales, _CPU) / 2 * 512
        return torch.cat([scales.view(torch.uint8), _digits(codec)]).to(device)
    else:
        table = torch.cat([half_table(stage.entries, _CPU) * by for stage, by in _stages(codec)])
    return table.to(device, dtype).contiguous()


def macros(
    codec: Codec, copies: int, dtype: torch.dtype, scale: torch.dtype, **own: int
) -> tuple[tuple[str, int], ...]:
    """Those of the decoder's files, for x in `dtype` and scales in `scale`; and a kernel's own."""
    common = {"BF16": int(dtype == torch.bfloat16), "SCALE": _SCALES[scale], "CODE_BITS": codec.code_bits}
    if isinstance(codec, Trellis):
        signs = signs_in(codec, copies)
        common |= {"TABLE_BITS": codec.table_bits + signs, "SIGNS": signs}
    elif isinstance(codec, NestedE8):
        common |= {"NESTED": codec.q, "FIRST": 0, "SECOND": codec.low.bit_length() - 1}
    else:
        first, *second = (stage.entries.bit_length() - 1 for stage, _ in _stages(codec))
        common |= {"NESTED": 0, "FIRST": first, "SECOND": sum(second)}
    return tuple({**common, "COPIES": copies, **own}.items())


def copies_in(codec: Codec, kilobytes: int) -> int:
    """How many copies of the table have room there; at most one for each lane that looks up at once."""
    if isinstance(codec, Trellis):
        most = min(32, 256 * kilobytes >> codec.table_bits + codec.signs)
        return most if most == 32 or codec.signs != 1 else most // 2
    if isinstance(codec, NestedE8):
        return 4
    return 1 << (min(16, 128 * kilobytes // _entries(codec)).bit_length() - 1)


def with_signs(codec: Codec, copies: int) -> int:
    """At most so many copies, of a table that has both signs if there is room: two passes, but an instruction less."""
    return min(copies, 16) if isinstance(codec, Trellis) and codec.signs == 1 else copies


def signs_in(codec: Trellis, copies: int) -> int:
    """Of a pair's two signs, those that the table has."""
    return 2 if codec.signs == 1 and copies < 32 else codec.signs


def spread(codec: Codec, copies: int) -> bool:
    """Whether the table has holes, as tiles.cuh says."""
    return isinstance(codec, Trellis) and codec.signs < 2 and copies == 32


def table_bytes(codec: Codec, copies: int) -> int:
    """Of shared memory that hold `copies` of the table."""
    if isinstance(codec, Trellis):
        return 7 * HOLE if spread(codec, copies) else 4 * copies << codec.table_bits + signs_in(codec, copies)
    if isinstance(codec, NestedE8):
        return -(-(128 + (0 if codec.q % 3 else 8 * copies * _NUMBERS)) // 1024) * 1024  # stages of x follow it
    return 8 * copies * _entries(codec)


def _digits(codec: NestedE8) -> Tensor:
    """uint8: of each number its four lowest digits in base 3, lowest first, times q's power of two / 512, in fp16."""
    digits = torch.arange(_NUMBERS)[:, None] // 3 ** torch.arange(4) % 3
    return (digits * (codec.low / 512)).half().view(torch.uint8).flatten()


def _stages(codec: Codec) -> list[tuple[FactoredE8, float]]:
    """The factored codes that an E8 codec adds up, and what their lattice's points are multiplied by."""
    if isinstance(codec, ResidualE8):
        return [(codec.first, 1 / codec.first.density), (codec.second, codec.gain / codec.second.density)]
    assert isinstance(codec, FactoredE8)
    return [(codec, 1 / codec.density)]


def _entries(codec: Codec) -> int:
    return sum(4 * stage.entries for stage, _ in _stages(codec))
