"""Every kernel that a matrix may need, compiled and loaded ahead: no request waits for that, and no rank."""

from functools import cache

import torch

from glq import nvrtc
from glq.ops.inputs import norm_of, plain, silu_of
from glq.ops.matmul import cuda_product, has_cuda_kernel, kernel_tokens, makes_input
from glq.packed import PACKED_DTYPES, PackedLinear, packed_shapes


@cache
def prepare(
    device: torch.device,
    dtype: torch.dtype,
    codec: str,
    out_features: int,
    in_features: int,
    block: int,
    tokens: int,
) -> None:
    """Load what products of up to `tokens` tokens in `dtype` with such a matrix take, where it has kernels."""
    if has_cuda_kernel(torch.empty(1, device=device, dtype=dtype), codec):
        shapes = packed_shapes(codec, out_features, in_features)
        tensors = {key: torch.zeros(shape, dtype=PACKED_DTYPES[key], device=device) for key, shape in shapes.items()}
        run_all(PackedLinear(codec, out_features, in_features, block, **tensors), dtype, tokens, nvrtc.gpu(device))


def run_all(weight: PackedLinear, dtype: torch.dtype, most: int, gpu: nvrtc.Launcher) -> None:
    """A product by each kernel that up to `most` tokens take, with every kind of x."""
    for tokens in (t for t in kernel_tokens(weight.out_features) if t <= most):
        x = torch.zeros(tokens, weight.in_features, dtype=dtype, device=weight.codes.device)
        made = [silu_of(x, x), norm_of(x, x, x[0], 1e-5)] if makes_input(tokens, weight.block, gpu) else []
        for one in (plain(x), *made):
            cuda_product(one, weight, gpu)
