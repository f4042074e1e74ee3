"""Products whose x is made on the way, silu(gate) · up or a normed sum: fewer kernels between those of a model."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from glq.ops.matmul import matmul


@torch.library.custom_op("glq::silu_matmul", mutates_args=())
def silu_matmul(
    gate: Tensor, up: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    """matmul of silu(gate) · up, both [..., in] with columns side by side; the rest as in ops.matmul."""
    return matmul(silu(gate) * up, codes, scale, signs, codec, out_features, block)


@silu_matmul.register_fake
def _(
    gate: Tensor, up: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], out_features)


@torch.library.custom_op("glq::norm_matmul", mutates_args=())
def norm_matmul(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    codec: str,
    out_features: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """s = x + residual, both [..., in]; (matmul of s / √(mean(s²) + eps) · weight, s). The rest as in ops.matmul."""
    total = x + residual
    return matmul(normed(total, weight, eps), codes, scale, signs, codec, out_features, block), total


@norm_matmul.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    codec: str,
    out_features: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], out_features), torch.empty_like(x)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., in] in fp32, as transformers' Llama has it (arXiv:1910.07467)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
