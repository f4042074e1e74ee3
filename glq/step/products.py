"""Products whose x is made just ahead of them, silu(gate) · up or a normed sum: found among the calls of a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from glq import nvrtc
from glq.ops.fused_matmul import norm_matmul, silu_matmul
from glq.ops.matmul import makes_input
from glq.step.record import Call, Recording, Value, values_in

_aten = torch.ops.aten

# (function, operands): each of these a number, a name for what is found there, or such a pattern itself.
_MUL, _ADD, _TO = _aten.mul.Tensor, _aten.add.Tensor, _aten._to_copy.default
_SILU = (_MUL, (_aten.silu.default, "gate"), "up")
_MEAN = (_aten.mean.dim, (_aten.pow.Tensor_Scalar, "wide", 2), [-1], True)
_NORM = (_MUL, "weight", (_TO, (_MUL, "wide", (_aten.rsqrt.default, (_ADD, _MEAN, "eps")))))
_WIDE = (_TO, "total")
_TOTAL = (_ADD, "x", "residual")


@dataclass(frozen=True)
class Product:
    """An op of ops.fused_matmul that does the work of calls, at the place of the last one."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Value, ...]  # y and, of a normed sum, the sum

    @property
    def reads(self) -> tuple[Value, ...]:
        return values_in(self.args)


def products(recording: Recording, gpu: nvrtc.Launcher) -> list[Product]:
    """All for which kernels make x: otherwise the ops are no faster than their calls. A call belongs to one at most."""
    finder = _Finder(recording)
    found: list[Product] = []
    taken: set[Call] = set()
    for call in recording.calls:
        if _has_kernels(call, gpu):
            ways = (way for way in finder.ways(call) if finder.is_one(way) and taken.isdisjoint(way.calls))
            way = next(ways, None)
            if way is not None:
                taken.update(way.calls)
                found.append(way)
    return found


@dataclass(frozen=True)
class _Match:
    """What names stand for, and the calls that make it so."""

    names: dict[str, Any] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()


class _Finder:
    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._kept = recording.kept
        self._place = {call: i for i, call in enumerate(recording.calls)}
        self._maker = {v: call for call in recording.calls for v in call.makes}
        self._readers = recording.readers()

    def ways(self, product: Call) -> Iterator[Product]:
        """To compute a product together with its x."""
        x, *weight = product.args
        (y,) = product.makes
        for match in self._matches(_SILU, x, _Match()):
            gate, up = match.names["gate"], match.names["up"]
            if _are_rows(x, gate, up):
                yield Product(silu_matmul, (gate, up, *weight), self._in_order(match, product), (y,))
        for match in self._norms(x):
            n = match.names
            if self._is_given(n["weight"]) and _is_norm(x, **n):
                args = (n["x"], n["residual"], n["weight"], float(n["eps"]), *weight)
                yield Product(norm_matmul, args, self._in_order(match, product), (y, n["total"]))

    def _norms(self, x: Value) -> Iterator[_Match]:
        for norm in self._matches(_NORM, x, _Match()):
            for wide in self._matches(_WIDE, norm.names["wide"], norm):
                yield from self._matches(_TOTAL, wide.names["total"], wide)

    def _matches(self, pattern: Any, x: Any, so_far: _Match) -> Iterator[_Match]:
        """Ways in which x is made as the pattern says."""
        if isinstance(pattern, str):
            if so_far.names.get(pattern, x) is x:
                yield _Match(so_far.names | {pattern: x}, so_far.calls)
        elif not isinstance(pattern, tuple):
            if not isinstance(x, Value) and x == pattern:
                yield so_far
        elif isinstance(x, Value) and (call := self._maker.get(_whole(x))) is not None:
            function, *operands = pattern
            plain = function is _TO or not call.kwargs  # a copy is told by what it makes
            if call.function is function and plain and len(call.args) == len(operands):
                here = _Match(so_far.names, (*so_far.calls, call))
                yield from self._all_match(operands, call.args, here)
                if function in (_MUL, _ADD):
                    yield from self._all_match(operands, call.args[::-1], here)

    def _all_match(self, patterns: list[Any], args: tuple[Any, ...], so_far: _Match) -> Iterator[_Match]:
        if not patterns:
            yield so_far
            return
        for match in self._matches(patterns[0], args[0], so_far):
            yield from self._all_match(patterns[1:], args[1:], match)

    def _is_given(self, weight: Any) -> bool:
        """Whether no kernel of the step makes it: products read it before they wait for the one ahead of them."""
        return isinstance(weight, Value) and weight.root in self._recording.given

    def _in_order(self, match: _Match, product: Call) -> tuple[Call, ...]:
        return tuple(sorted({*match.calls, product}, key=self._place.__getitem__))

    def is_one(self, product: Product) -> bool:
        """Whether all can be done at the last call's place: nobody else reads what is between them, or changes it."""
        calls, last = set(product.calls), product.calls[-1]
        for v in (v for call in product.calls[:-1] for v in call.makes):
            others = self._readers[v] - calls
            if v in product.outputs:
                if any(self._place[other] < self._place[last] for other in others):
                    return False
            elif others or v in self._kept:
                return False
        memory = self._recording.memory
        read = memory(v.root for call in calls for v in call.reads)
        between = self._recording.calls[self._place[product.calls[0]] : self._place[last]]
        return read.isdisjoint(memory(v for call in between for v in call.writes))


def _whole(x: Value) -> Value:
    """The tensor that x is all of, if it is a view of such a one; else x."""
    same = not x.offset and (x.shape, x.stride) == (x.root.shape, x.root.stride)
    return x.root if same else x


def _has_kernels(call: Call, gpu: nvrtc.Launcher) -> bool:
    """Whether it is a product for which kernels make x."""
    if call.function is not torch.ops.glq.matmul.default or call.kwargs:
        return False
    x, *_, codec, _, block = call.args
    of_16_bits = x.dtype in (torch.float16, torch.bfloat16)
    return of_16_bits and makes_input(codec, prod(x.shape[:-1]), block, gpu)


def _is_norm(normed: Value, total: Value, x: Any, residual: Any, weight: Value, wide: Value, eps: Any) -> bool:
    """Whether it is an RMSNorm in fp32 of a sum that lies in memory as the op returns it."""
    dense = tuple(prod(total.shape[d + 1 :]) for d in range(len(total.shape)))
    return (
        isinstance(eps, int | float)
        and (weight.shape, weight.stride, weight.dtype) == (normed.shape[-1:], (1,), normed.dtype)
        and wide.dtype == torch.float32
        and total.view_of is None
        and _steps(total) == _steps(total, dense)
        and _are_rows(normed, total, x, residual)
    )


def _are_rows(like: Value, *parts: Any) -> bool:
    """Whether parts have its shape and type, and rows that begin at 16 bytes, as far apart in all: kernels need it."""
    return all(
        isinstance(p, Value)
        and (p.shape, p.dtype, p.device) == (like.shape, like.dtype, like.device)
        and _steps(p) == _steps(parts[0])
        and p.stride[-1] == 1
        and all(n % 8 == 0 for n in (p.offset, *_steps(p)[:-1]))
        for p in parts
    )


def _steps(x: Value, strides: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Strides, where they matter."""
    return tuple(st for st, size in zip(strides or x.stride, x.shape, strict=True) if size > 1)
