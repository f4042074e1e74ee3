"""How upstream stores codes: tensors of a matrix's rows ↔ numbers of table rows, 8 columns each."""

import torch
from torch import Tensor

E8P_ROWS, E8P_COLUMNS = 16, 64  # of a tile
_GROUP = 8  # columns that a code stands for


def shell_codes(codes: Tensor) -> Tensor:
    """[rows, columns / 8] int16, whose bits are those of uint16 → int32."""
    return codes.to(torch.int32) & 0xFFFF


def e8p_codes(packed: Tensor) -> Tensor:
    """[rows / 16, columns / 64, 8, 4] int64 → [rows, columns / 8] int32.

    An element has four codes, of two rows × two groups of columns: the upper byte of each in a byte of its lower half,
    and the bits of its lower byte four apart in its upper half.
    """
    i = torch.arange(4, device=packed.device)
    word = packed[..., None]
    upper = word >> 8 * i & 255
    lower = torch.zeros_like(upper)
    for bit in range(8):
        lower |= (word >> (32 + 4 * bit + i) & 1) << bit
    codes = (upper << 8 | lower).to(torch.int32)  # [A, B, r, c, (group, row) of the four]
    a, b = packed.shape[:2]
    codes = codes.view(a, b, 8, 4, 2, 2).permute(0, 2, 5, 1, 3, 4)  # A, r, row, B, c, group
    return codes.reshape(a * E8P_ROWS, b * E8P_COLUMNS // _GROUP)


def e81b_codes(packed: Tensor) -> Tensor:
    """[rows, columns / 64] int64, whose bytes are the codes in order → [rows, columns / 8] int32."""
    return packed.contiguous().view(torch.uint8).to(torch.int32)
