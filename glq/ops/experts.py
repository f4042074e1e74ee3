"""y = x · W_eᵀ for pairs of a token and an expert e, W_e packed: one op above every implementation."""

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.custom_op import custom_op, register_fake
from glq.errors import GlqError
from glq.ops import cuda_experts, cuda_experts_prefill, grouped
from glq.ops.matmul import has_cuda_kernel, has_triton_kernel
from glq.packed import PackedExperts, unpack_signs
from glq.rotation import rotate


@custom_op("experts_matmul")
def experts_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    expert_of: Tensor,
    top_k: int,
    codec: str,
    out_features: int,
    block: int,
) -> Tensor:
    """x [pairs / top_k, in] fp32, fp16 or bf16, expert_of [pairs] int32 or int64 → y [pairs, out] in x's dtype.

    Pair p is row p // top_k of x times the matrix of expert expert_of[p], or zeros if there is no such expert (−1, say:
    another device has it). The rest as in PackedExperts. On a GPU nothing waits for the values of expert_of.
    """
    if len(expert_of) != len(x) * top_k:
        raise GlqError(f"{len(x)} rows of x with {top_k} experts each, but {len(expert_of)} pairs in expert_of")
    weights = PackedExperts(codec, out_features, x.shape[1], block, codes, scale, signs)
    if x.device.type != "cuda":
        return experts_reference(x, weights, expert_of, top_k)
    if x.numel() == 0:
        return x.new_empty(len(expert_of), out_features)
    return _on_gpu(x, weights, expert_of, top_k)


@register_fake("experts_matmul")
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    expert_of: Tensor,
    top_k: int,
    codec: str,
    out_features: int,
    block: int,
) -> Tensor:
    return x.new_empty(expert_of.shape[0], out_features)  # len() would make a constant of it in torch.compile


def experts_reference(x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int) -> Tensor:
    """What the op means: rotate x in fp32, multiply by each expert's decoded and scaled codes in x's dtype."""
    rotated = rotate(x.float(), unpack_signs(weights.signs, weights.in_features), weights.block).to(x.dtype)
    y = x.new_zeros(len(expert_of), weights.out_features)
    for e in range(weights.count):
        (pairs,) = torch.where(expert_of == e)
        if len(pairs):
            matrix = weights[e].decode() * weights[e].scale.float()[:, None]
            y[pairs] = rotated[pairs // top_k] @ matrix.to(x.dtype).T
    return y


def _on_gpu(x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int) -> Tensor:
    """By what is fastest for so many pairs."""
    by_cuda = has_cuda_kernel(x, weights.codec)  # of which only trellises have a kernel for many pairs
    if by_cuda and isinstance(get_codec(weights.codec), Trellis):
        return cuda_product(x, weights, expert_of, top_k, nvrtc.gpu(x.device))
    if grouped.applies(x, weights, len(expert_of)) and has_triton_kernel(x.device, weights.codec):
        return grouped.matmul(x, weights, expert_of, top_k)
    if by_cuda:
        return cuda_product(x, weights, expert_of, top_k, nvrtc.gpu(x.device))
    if not has_triton_kernel(x.device, weights.codec):
        return experts_reference(x, weights, expert_of, top_k)
    from glq.ops import triton_experts

    return triton_experts.matmul(x, weights, expert_of, top_k)


def cuda_product(x: Tensor, weights: PackedExperts, expert_of: Tensor, top_k: int, gpu: nvrtc.Launcher) -> Tensor:
    """By the kernel in CUDA C++ that is fastest for so many pairs."""
    many = cuda_experts_prefill.takes(get_codec(weights.codec), weights.count, weights.block, len(expert_of), gpu)
    return (cuda_experts_prefill if many else cuda_experts).matmul(x, weights, expert_of, top_k, gpu)
