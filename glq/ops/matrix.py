"""What a kernel for a packed matrix is chosen by: all but what its tensors hold."""

from typing import NamedTuple

import torch


class Matrix(NamedTuple):
    """W [rows, cols] in codes."""

    codec: str
    scale: torch.dtype  # of the rows' scales
    rows: int
    cols: int
    block: int  # width of the rotation

    @property
    def tiles(self) -> tuple[int, int]:
        """Along the rows and the columns, 64 × 64 each."""
        return -(-self.rows // 64), -(-self.cols // 64)
