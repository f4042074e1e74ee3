"""Every kernel that a matrix may need, compiled and loaded ahead: no request waits for that, and no rank."""

from dataclasses import replace
from functools import cache

import torch

from glq import nvrtc
from glq.codecs import get_codec
from glq.ops import cuda_combine, cuda_experts, cuda_experts_prefill, cuda_rotate
from glq.ops.experts import experts_matmul
from glq.ops.inputs import norm_of, plain, silu_of
from glq.ops.matmul import cuda_product, has_cuda_kernel, kernel_tokens
from glq.packed import PACKED_DTYPES, PackedExperts, PackedLinear, packed_shapes


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
    for tokens in (t for t in kernel_tokens(weight.codec, weight.out_features) if t <= most):
        x = torch.zeros(tokens, weight.in_features, dtype=dtype, device=weight.codes.device)
        made = [silu_of(x, x), norm_of(x, x, x[0], 1e-5)] if cuda_combine.takes(weight.in_features) else []
        for one in (plain(x), *made):
            cuda_product(one, weight, gpu)


def prepare_experts(weights: PackedExperts, dtype: torch.dtype, each: int, top_k: int, tokens: int) -> None:
    """The same for up to `tokens` tokens of `top_k` experts each, where a row of x has `each` of them."""
    device = weights.codes.device
    if not has_cuda_kernel(torch.empty(1, device=device, dtype=dtype), weights.codec):
        return
    facts = (weights.codec, cuda_experts.Task.of(weights, 0, each), weights.block, weights.scale.dtype, dtype)
    for pairs in kernel_pairs(*facts, top_k, tokens, nvrtc.gpu(device)):
        x = torch.zeros(pairs // each, weights.in_features, dtype=dtype, device=device)
        expert_of = torch.arange(pairs, device=device) % weights.count
        sizes = (weights.codec, weights.out_features, weights.block)
        experts_matmul(x, weights.codes, weights.scale, weights.signs, expert_of, each, *sizes)


@cache
def kernel_pairs(
    codec: str,
    task: cuda_experts.Task,
    block: int,
    scale: torch.dtype,
    dtype: torch.dtype,
    top_k: int,
    tokens: int,
    gpu: nvrtc.Launcher,
) -> tuple[int, ...]:
    """Numbers of pairs, one for each kernel that up to `tokens` tokens take; task: of any number."""
    of, found = get_codec(codec), dict[object, int]()
    for pairs in range(top_k, tokens * top_k + 1, top_k):
        plan: cuda_experts.Plan | cuda_experts_prefill.Plan
        if cuda_experts_prefill.takes(of, task.experts, block, pairs, gpu):
            plan = cuda_experts_prefill.make_plan(of, dtype, scale, pairs / task.experts, gpu)
        else:
            plan = cuda_experts.make_plan(of, dtype, scale, replace(task, pairs=pairs), block, gpu)
        found.setdefault((plan.source, pairs // task.top_k > cuda_rotate.FEW), pairs)
    return tuple(found.values())
