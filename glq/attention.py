"""Attention in fp32 where several heads of queries share one of keys, which PyTorch's fused kernels do not take."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class OneHeadEach(TorchFunctionMode):
    """While it lasts, each head of queries has its own copy of its keys and values, in fp32.

    Without, PyTorch writes all scores to memory, and computes them in TF32 where products may be: 8.6 ms instead of
    2.3 for 4 × 2,048 tokens with 32 heads of 64 and 8 of keys on an H100, with an error of 4e-4 instead of 5e-7.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and len(args) >= 3 and kwargs.get("enable_gqa"):
            query, key, value, *rest = args
            if query.dtype == torch.float32:
                args = (query, _repeated(key, query), _repeated(value, query), *rest)
                kwargs = {**kwargs, "enable_gqa": False}
        return func(*args, **kwargs)


def _repeated(shared: Tensor, query: Tensor) -> Tensor:
    """[..., heads, tokens, width] with as many heads as the queries have."""
    return shared.repeat_interleave(query.shape[-3] // shared.shape[-3], dim=-3)
