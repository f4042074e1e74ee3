"""One token times a packed matrix with Triton: what is launched (triton_one_token_kernel.py has the product)."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from glq.ops import triton_nvidia
from glq.ops.triton_one_token_kernel import product_kernel
from glq.ops.triton_rotate import rotate_to_words
from glq.ops.triton_tables import decoder, multiprocessors, one_token_table, units


@dataclass(frozen=True)
class Plan:
    """How a product is cut."""

    group: int  # rows g of a program, 1 to 8
    tiles: int  # of columns at a time; what is beyond the matrix is decoded, too, and multiplied by 0
    warps: int
    registers: int | None = None  # a thread has at most, where the compiler would take more and leave no room


# By family and code_bits, measured on an H100 (docs/decisions.md, "Triton"). Whatever is not here has _OTHER, measured
# for trellis-2.5 and nested-3 alone. With 48 bits a thread has whole lanes: group · tiles = 8 · warps.
_PLANS = {
    ("trellis", 32): Plan(2, 8, 4),
    ("trellis", 48): Plan(2, 16, 4, registers=128),
    ("trellis", 64): Plan(2, 4, 4),
    ("e8", 16): Plan(2, 16, 4),
}
_FEW_ROWS = _PLANS | {("trellis", 32): Plan(2, 8, 8), ("trellis", 64): Plan(1, 16, 4)}
_OTHER = Plan(2, 8, 4)


def plan_of(codec: str, row_tiles: int, processors: int) -> Plan:
    """With less than a row of tiles a multiprocessor, programs have fewer rows or more warps, which fill the GPU."""
    plans = _FEW_ROWS if row_tiles < processors else _PLANS
    return plans.get((decoder(codec).FAMILY, decoder(codec).CODE_BITS), _OTHER)


def words_in_a_row(codec: str) -> int:
    """How many of a lane's words lie side by side, up to 16 bytes."""
    return {64: 2, 48: 4, 32: 4}.get(decoder(codec).CODE_BITS, 8)


def matmul(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, block: int, y: Tensor) -> None:
    """x [in] → y [out]; both contiguous, the rest as in PackedLinear."""
    row_tiles, col_tiles, _ = codes.shape
    plan = plan_of(codec, row_tiles, multiprocessors(x.device))
    padded = triton.cdiv(col_tiles, plan.tiles) * plan.tiles * 64
    # before the rotation, since the product may read both before it waits
    words, table, (unit, gain) = codes.contiguous().view(torch.uint32), one_token_table(codec, x.device), units(codec)
    rotated = rotate_to_words(x, signs, block, padded, words_in_a_row(codec))
    product_kernel[(row_tiles * 8 // plan.group,)](
        words,
        rotated.view(torch.int64).view(torch.uint64),
        table,
        scale,
        y,
        len(y),
        col_tiles,
        **decoder(codec).constants,
        ENTRIES=0 if decoder(codec).FAMILY == "nested" else len(table),
        UNIT=unit,
        GAIN=gain,
        SIZE=words_in_a_row(codec),
        GROUP=plan.group,
        TILES=plan.tiles,
        EARLY=triton_nvidia.starts_early(x.device),
        PTX=triton_nvidia.is_nvidia(x.device),
        num_warps=plan.warps,
        num_stages=1,
        **triton_nvidia.options(x.device, plan.registers),
    )
