"""The x of a product that no rotation makes: silu(gate) · up, or a normed sum. Launches ops/combine.cu."""

from functools import lru_cache

import torch
from torch import Tensor

from glq import nvrtc
from glq.ops.inputs import Input

_THREADS = 256  # of a token


def takes(in_features: int) -> bool:
    """Whether rows of so many columns are whole pieces of 16 bytes."""
    return in_features % 8 == 0


def combine(x: Input, gpu: nvrtc.Launcher) -> Tensor:
    """What is to be rotated [tokens, in], of an x that is not plain; the sum of a norm goes to its total."""
    tokens, in_features = x.shape
    out = x.first.new_empty(tokens, in_features)
    gpu.launch(_source(x.dtype, x.kind), "combine", tokens, _THREADS, 0, *x.tensors, out, *x.sizes, in_features)
    return out


@lru_cache
def _source(dtype: torch.dtype, kind: int) -> nvrtc.Source:
    macros = (("BF16", int(dtype == torch.bfloat16)), ("INPUT", kind))
    return nvrtc.Source(("ops/ptx.cuh", "ops/hadamard.cuh", "ops/input.cuh", "ops/combine.cu"), macros)
