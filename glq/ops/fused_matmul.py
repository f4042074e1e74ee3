"""Products whose x is made on the way, silu(gate) · up or a normed sum: fewer kernels between those of a model."""

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from glq import nvrtc
from glq.custom_op import custom_op, register_fake
from glq.ops import cuda_combine, cuda_rotate
from glq.ops.inputs import Input, norm_of, silu_of
from glq.ops.matmul import compare, cuda_matmul, cuda_product, has_cuda_kernel, matmul, matmul_reference
from glq.packed import PackedLinear, packed_shapes


@custom_op("silu_matmul")
def silu_matmul(
    gate: Tensor, up: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    """matmul of silu(gate) · up, both [..., in]; the rest as in ops.matmul."""
    if not _is_made(gate, codec):
        return matmul(silu(gate) * up, codes, scale, signs, codec, out_features, block)
    x = silu_of(gate.flatten(0, -2), up.flatten(0, -2))
    y = cuda_matmul(x, codes, scale, signs, codec, out_features, block)
    return y if gate.ndim == 2 else y.view(*gate.shape[:-1], out_features)


@register_fake("silu_matmul")
def _(
    gate: Tensor, up: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], out_features)


@custom_op("norm_matmul")
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
    """s = x + residual, both [..., in]; (matmul of weight · s / √(mean(s²) + eps), s). The rest as in ops.matmul.

    weight [in] is in x's dtype.
    """
    if not _is_made(x, codec):
        total = x + residual
        return matmul(normed(total, weight, eps), codes, scale, signs, codec, out_features, block), total
    made = norm_of(x.flatten(0, -2), residual.flatten(0, -2), weight, eps)
    y = cuda_matmul(made, codes, scale, signs, codec, out_features, block)
    return (y, made.total) if x.ndim == 2 else (y.view(*x.shape[:-1], out_features), made.total.view(x.shape))


@register_fake("norm_matmul")
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
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(x.shape)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., in] (arXiv:1910.07467), in fp32 and rounded once; on a GPU one kernel of PyTorch's."""
    return rms_norm(x, x.shape[-1:], weight, eps)


def _is_made(x: Tensor, codec: str) -> bool:
    """Whether kernels make x, while they rotate it or before."""
    made = x.is_cuda and x.ndim > 1 and cuda_combine.takes(x.shape[-1]) and has_cuda_kernel(x, codec)
    return made and _works(x.device)


@cache
def _works(device: torch.device) -> bool:
    """Whether such products are what their parts are, on this device."""
    gpu = nvrtc.gpu(device)
    try:
        try_out(lambda x, weight: cuda_product(x, weight, gpu), device)
    except Exception as error:  # noqa: BLE001 (cuda-core, NVRTC and the driver have kinds of their own)
        warnings.warn(f"glq's products do not make their x here: {error}", stacklevel=2)
        return False
    return True


def try_out(product: Callable[[Input, PackedLinear], Tensor], device: torch.device) -> None:
    """Check small products in fp16 with each kind of x. GlqError if one is wrong.

    With one token, blocks of threads have parts of a row of W here, so parts of x to rotate, but all of it to norm.
    """
    for tokens, cols in ((1, 8192), (3, 256), (129, 256), (cuda_rotate.MADE + 1, 256)):
        shape = packed_shapes("trellis-2", 128, cols)["codes"]
        codes = torch.arange(math.prod(shape), device=device).to(torch.uint8).view(shape)
        scale = torch.linspace(0.5, 2, 128, device=device).half()
        signs = torch.full((cols // 8,), 0x5A, dtype=torch.uint8, device=device)
        a, b = (torch.linspace(-3, end, tokens * cols, device=device).half().view(-1, cols) for end in (2, 5))
        weight = torch.linspace(-1, 1, cols, device=device).half()
        norm = norm_of(a, b, weight, 1e-5)
        for made, x in ((silu_of(a, b), silu(a) * b), (norm, normed(a + b, weight, 1e-5))):
            y = product(made, PackedLinear("trellis-2", 128, cols, 256, codes, scale, signs))
            compare(y, matmul_reference(x, codes, scale, signs, "trellis-2", 128, 256), tokens)
        compare(norm.total, a + b, tokens)
