"""MXFP4, in which gpt-oss is published: 4-bit floats in blocks of 32 that share a power of two, read as 16-bit weights.

The experts' 3-D parameters are stored in it, each as two tensors.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from glq.errors import GlqError

METHOD = "mxfp4"  # quant_method in config.json
_BLOCKS, _SCALES = "_blocks", "_scales"  # endings of the names of a parameter's two tensors
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of one bit of mantissa and two of exponent; bit 3 is the sign
_BIAS = 127  # of the exponents; 255 stands for NaN


def find_packed(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Parameters stored as MXFP4 → the names of their blocks and their scales. GlqError for one without the other."""
    known = set(names)
    parameters = {name.removesuffix(end) for name in known for end in (_BLOCKS, _SCALES) if name.endswith(end)}
    for name in sorted(parameters):
        if lost := {name + _BLOCKS, name + _SCALES} - known:
            raise GlqError(f"the model is stored as MXFP4, and {lost.pop()} is missing: it is incomplete")
    return {name: (name + _BLOCKS, name + _SCALES) for name in parameters}


def decode(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, in, out] bf16, exact but for what bf16 cannot hold, from the tensors of a parameter.

    blocks [experts, out, in / 32, 16] uint8: two weights a byte, the first one in its low half; scales
    [experts, out, in / 32] uint8.
    """
    fits = blocks.ndim == 4 and blocks.shape[:3] == scales.shape and blocks.shape[3] == 16
    if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise GlqError(
            f"{name} is stored as MXFP4 blocks {list(blocks.shape)} and scales {list(scales.shape)}, which do not fit: "
            "the file is damaged"
        )
    values = torch.tensor([*_MAGNITUDES, *(-x for x in _MAGNITUDES)])
    experts, rows, groups, _ = blocks.shape
    weights = torch.empty(experts, 32 * groups, rows, dtype=torch.bfloat16)
    for weight, block, scale in zip(weights, blocks, scales, strict=True):  # one by one: they take much memory
        words = torch.stack([block & 15, block >> 4], -1).view(rows, groups, 32)
        power = torch.where(scale == 255, torch.nan, torch.exp2(scale.double() - _BIAS))
        weight.copy_((values[words.int()] * power[..., None]).view(rows, -1).T)
    return weights
