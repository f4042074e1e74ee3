"""What CUDA kernels need of a trellis codec."""

from functools import cache

import torch
from torch import Tensor

from glq.codecs.trellis import Trellis, pair_table, signed_table

HOLE = 32 * 1024  # bytes
_SCALES = {torch.float16: 16, torch.bfloat16: 0, torch.float32: 32}  # macro SCALE


@cache
def device_table(codec: Trellis, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2^index_bits, 2] in `dtype`."""
    table = signed_table(codec) if codec.signed_lookup else pair_table(codec)
    return table.to(device, dtype).contiguous()


def index_bits(codec: Trellis) -> int:
    return codec.table_bits + 2 * codec.signed_lookup


def macros(
    codec: Trellis, copies: int, dtype: torch.dtype, scale: torch.dtype, **own: int
) -> tuple[tuple[str, int], ...]:
    """Those of ptx.cuh and tiles.cuh, for x in `dtype` and scales in `scale`; and a kernel's own."""
    common = {
        "BF16": int(dtype == torch.bfloat16),
        "SCALE": _SCALES[scale],
        "CODE_BITS": codec.code_bits,
        "TABLE_BITS": index_bits(codec),
        "SIGNED": int(codec.signed_lookup),
        "COPIES": copies,
    }
    return tuple({**common, **own}.items())


def copies_in(codec: Trellis, kilobytes: int) -> int:
    """How many copies of the table have room there; at most one for each lane of a warp."""
    return min(32, 256 * kilobytes >> index_bits(codec))


def spread(codec: Trellis, copies: int) -> bool:
    """Whether the table has holes, as tiles.cuh says."""
    return not codec.signed_lookup and copies == 32


def table_bytes(codec: Trellis, copies: int) -> int:
    """Of shared memory that hold `copies` of the table."""
    return 7 * HOLE if spread(codec, copies) else 4 * copies << index_bits(codec)
