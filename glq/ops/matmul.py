"""y = x · Wᵀ for a packed W: one op above every implementation."""

import torch
from torch import Tensor

from glq.packed import decode_matrix, unpack_signs
from glq.rotation import rotate


@torch.library.custom_op("glq::matmul", mutates_args=())
def matmul(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int) -> Tensor:
    """x [..., in] fp32, fp16 or bf16 → y [..., out] in x's dtype; the rest as in PackedLinear."""
    return matmul_reference(x, codes, scale, signs, codec, out_features, block)


@matmul.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def matmul_reference(
    x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    """What the op means: rotate x in fp32, multiply by the decoded and scaled codes in x's dtype.

    The scales go into the weights, not onto the outputs: in fp16 a sum of unscaled weights would overflow.
    """
    in_features = x.shape[-1]
    weight = decode_matrix(codes, codec, out_features, in_features) * scale.float()[:, None]
    rotated = rotate(x.float(), unpack_signs(signs, in_features), block)
    return rotated.to(x.dtype) @ weight.to(x.dtype).T
