"""Operations that a kernel can do on the way, element by element: each as an expression in CUDA C++.

Arithmetic is PyTorch's: 16-bit types are computed in fp32, and every operation rounds to its result's type.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glq.step.record import Call, Value

C_TYPES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.int64: "long long",
    torch.int32: "int",
    torch.bool: "bool",
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_aten = torch.ops.aten

# By operation and its number of tensors and numbers; {0}, {1} … are these, in order.
_FLOAT_FORMULAS: dict[Any, str] = {
    _aten.neg.default: "-{0}",
    _aten.abs.default: "fabsf({0})",
    _aten.rsqrt.default: "rsqrtf({0})",
    _aten.sqrt.default: "sqrtf({0})",
    _aten.reciprocal.default: "1.0f / {0}",
    _aten.exp.default: "expf({0})",
    _aten.sin.default: "sinf({0})",
    _aten.cos.default: "cosf({0})",
    _aten.tanh.default: "tanhf({0})",
    _aten.relu.default: "{0} < 0.0f ? 0.0f : {0}",
    _aten.sigmoid.default: "1.0f / (1.0f + expf(-{0}))",
    _aten.silu.default: "{0} / (1.0f + expf(-{0}))",
    _aten.div.Tensor: "{0} / {1}",
}
_FORMULAS: dict[Any, str] = {
    _aten.clone.default: "{0}",
    _aten._to_copy.default: "{0}",
    _aten.mul.Tensor: "{0} * {1}",
    _aten.mul.Scalar: "{0} * {1}",
    _aten.where.self: "{0} ? {1} : {2}",
    _aten.logical_not.default: "!{0}",
}
_SUMS: dict[Any, str] = {
    _aten.add.Tensor: "{0} + {1}",
    _aten.add.Scalar: "{0} + {1}",
    _aten.sub.Tensor: "{0} - {1}",
    _aten.sub.Scalar: "{0} - {1}",
    _aten.rsub.Scalar: "{1} - {0}",
}
_COMPARISONS: dict[Any, str] = {
    getattr(getattr(_aten, name), overload): f"{{0}} {sign} {{1}}"
    for name, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    for overload in ("Tensor", "Scalar")
}
_OF_BOOLS: dict[Any, str] = {
    _aten.bitwise_and.Tensor: "{0} && {1}",
    _aten.bitwise_or.Tensor: "{0} || {1}",
    _aten.logical_and.default: "{0} && {1}",
    _aten.logical_or.default: "{0} || {1}",
    _aten.bitwise_not.default: "!{0}",
}
_GELU = {
    "none": "0.5f * {0} * (1.0f + erff({0} * 0.70710678118654752f))",
    "tanh": "0.5f * {0} * (1.0f + tanhf(0.79788456080286536f * ({0} + 0.044715f * {0} * {0} * {0})))",
}
_POWERS = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "sqrtf({0})", -0.5: "rsqrtf({0})", -1: "1.0f / {0}"}


@dataclass(frozen=True)
class Formula:
    """An element of the result, from the elements of `operands` at its place, broadcast as PyTorch does."""

    text: str
    operands: tuple[Value | float | int | bool, ...]
    types: tuple[torch.dtype, ...]  # in which each operand goes in


@dataclass(frozen=True)
class Concatenation:
    """Parts one after the other along a dimension."""

    parts: tuple[Value, ...]
    dim: int


@dataclass(frozen=True)
class Reduction:
    """Over the last dimension of `operand`: a sum, times `factor`."""

    operand: Value
    factor: str


@dataclass(frozen=True)
class Update:
    """New elements for `target`: those of `formula`, of `shape`; along `dim` at the places that `index` says."""

    target: Value
    shape: tuple[int, ...]
    formula: Formula
    dim: int = 0
    index: Value | None = None

    def is_local(self, call: Call) -> bool:
        """Whether each new element comes from no other one of what is changed."""
        return [v for v in call.reads if v.root is self.target.root] == [self.target]


def formula(call: Call) -> Formula | Concatenation | Reduction | Update | None:
    """What a kernel would do for this call; None if it has to be PyTorch."""
    op, args, kwargs = call.function, call.args, call.kwargs
    values = (*call.makes, *call.reads)
    if any(v.dtype not in C_TYPES or v.device != values[0].device for v in values) or not call.reads:
        return None
    if any(0 in v.shape for v in (call.makes if op is _aten.cat.default else values)):
        return None
    if call.writes:
        return _update(op, args, kwargs)
    if len(call.makes) != 1 or call.output is not call.makes[0]:
        return None
    out = call.makes[0]
    if op is _aten.cat.default:
        return _concatenation(out, *args, **kwargs)
    if op in (_aten.mean.dim, _aten.sum.dim_IntList):
        return _reduction(out, op is _aten.mean.dim, *args, **kwargs)
    text, used = _text(op, args, kwargs, out)
    if not text:
        return None
    operands = tuple(args[:used])
    if not all(isinstance(x, Value | float | int) for x in operands):
        return None
    return Formula(text, operands, _types(op, operands, out))


def _text(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Value) -> tuple[str, int]:
    """The expression and its number of operands; "": there is none."""
    is_float = out.dtype in _FLOATS
    if op is _aten._to_copy.default and kwargs.get("device", out.device) != out.device:
        return "", 0
    if op in _FORMULAS or op in _COMPARISONS:
        return (_FORMULAS | _COMPARISONS)[op], 3 if op is _aten.where.self else len(args)
    if op in _SUMS and len(args) == 2 and kwargs.get("alpha", 1) == 1:
        return _SUMS[op], 2
    if op in _OF_BOOLS and all(isinstance(x, Value) and x.dtype == torch.bool for x in args):
        return _OF_BOOLS[op], len(args)
    if op in _FLOAT_FORMULAS and is_float:
        return _FLOAT_FORMULAS[op], len(args)
    if op is _aten.gelu.default and is_float:
        return _GELU[kwargs.get("approximate", "none")], 1
    if op is _aten.pow.Tensor_Scalar and is_float and args[1] in _POWERS:
        return _POWERS[args[1]], 1
    return "", 0


def _types(op: Any, operands: tuple[Any, ...], out: Value) -> tuple[torch.dtype, ...]:
    if op in (_aten._to_copy.default, _aten.clone.default):
        return (operands[0].dtype,)
    if op is _aten.where.self:
        return torch.bool, out.dtype, out.dtype
    if op in _COMPARISONS:
        examples = [torch.empty(v.shape and (1,), dtype=v.dtype) if isinstance(v, Value) else v for v in operands]
        return (torch.result_type(*examples),) * len(operands)
    if op is _aten.logical_not.default or op in _OF_BOOLS:
        return (torch.bool,) * len(operands)
    return (out.dtype,) * len(operands)


def _update(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Update | None:
    target = args[0]
    if op is _aten.index_copy_.default and not kwargs:
        dim, index, source = args[1:]
        if source.dtype == target.dtype and len(target.shape) == len(source.shape) and len(index.shape) == 1:
            return Update(
                target, source.shape, Formula("{0}", (source,), (source.dtype,)), dim % len(target.shape), index
            )
    if op is _aten.add_.Tensor and not kwargs and target.dtype != torch.bool:
        return Update(target, target.shape, Formula("{0} + {1}", args, (target.dtype,) * 2))
    return None


def _concatenation(out: Value, parts: list[Value], dim: int = 0) -> Concatenation | None:
    parts = [p for p in parts if 0 not in p.shape]
    if any(p.dtype != out.dtype or len(p.shape) != len(out.shape) for p in parts):
        return None
    return Concatenation(tuple(parts), dim % len(out.shape))


def _reduction(
    out: Value, mean: bool, x: Value, dims: list[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Reduction | None:
    last = len(x.shape) - 1
    if dims is None or [d % len(x.shape) for d in dims] != [last] or x.dtype not in _FLOATS or out.dtype not in _FLOATS:
        return None
    return Reduction(x, f"(1.0f / {x.shape[-1]})" if mean else "1.0f")


def literal(number: float | int | bool, dtype: torch.dtype) -> str:
    """A number as an expression of the C type for `dtype`."""
    if dtype not in _FLOATS:
        return f"({C_TYPES[dtype]}){int(number)}ll"
    with np.errstate(over="ignore"):  # fp32 has no room for some that mean "nothing comes near"
        return f"__uint_as_float({np.array(number, np.float32).view(np.uint32)}u)"
