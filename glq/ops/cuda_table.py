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
