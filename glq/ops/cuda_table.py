"""What CUDA kernels need of a trellis codec."""

from functools import cache

import torch
from torch import Tensor

from glq.codecs.trellis import Trellis, pair_table

SCALES = {torch.float16: 16, torch.bfloat16: 0, torch.float32: 32}  # macro SCALE


@cache
def device_table(codec: Trellis, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[2^table_bits, 2] in `dtype`."""
    return pair_table(codec).to(device, dtype).contiguous()


def table_bytes(codec: Trellis, copies: int) -> int:
    """Of shared memory that hold `copies` of the table, aligned as tiles.cuh wants it."""
    size = 4 * copies << codec.table_bits
    return 2 * size if 4 * copies == 1 << 15 - codec.table_bits else size
