"""PyTorch's ops, in half the time that torch.library.custom_op adds to a call: a prefill makes hundreds of them."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from glq.errors import GlqError

P = ParamSpec("P")
R = TypeVar("R")
_library = torch.library.Library("glq", "FRAGMENT")


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function glq::`name`, on all devices, as torch.library.custom_op does; register_fake says what it returns.

    Backward through it is a GlqError.
    """

    def define(function: Callable[P, R]) -> Callable[P, R]:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        if not mutates_args:  # PyTorch takes formulas for no others

            def refuse(*_: Any) -> None:
                raise GlqError(f"glq::{name} has no gradient: to train, take plain weights, by model.dequantize()")

            torch.library.register_autograd(f"glq::{name}", refuse, lib=_library)
        return cast(Callable[P, R], getattr(torch.ops.glq, name).default)

    return define


def register_fake(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function say what glq::`name` returns, in tensors without values (torch.library.register_fake)."""
    return cast(Callable[[Callable[P, R]], Callable[P, R]], torch.library.register_fake(f"glq::{name}", lib=_library))
