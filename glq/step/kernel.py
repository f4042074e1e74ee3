"""One kernel for many small operations: its text, in CUDA C++.

A kernel computes tensors that are used later, its outputs, from tensors that lie in memory. Each output has blocks of
threads of its own, which compute all that lies between for themselves: no block waits for another one. An output with
a reduction on the way (a mean, as in RMSNorm) has one block a row, which reduces first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glq import nvrtc
from glq.errors import GlqError
from glq.step.formulas import C_TYPES, Concatenation, Formula, Reduction, Update, literal
from glq.step.record import Value

Formulas = dict[Value, Formula | Concatenation | Reduction]

_IN_MEMORY = {torch.float16: "u16", torch.bfloat16: "u16", torch.bool: "u8"}
_WIDE = 1024  # columns from which a reduction has blocks of 512 threads
_MOST_BLOCKS = 1024  # of an output without a reduction
_MOST_ROWS = 1 << 22  # elements of an output with one


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the tensors that it reads and writes, in the order of its parameters."""

    source: nvrtc.Source
    name: str
    blocks: int
    threads: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    targets: tuple[Value, ...]  # changed in place

    def launch(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], targets: Sequence[Tensor], gpu: nvrtc.Launcher
    ) -> None:
        gpu.launch(self.source, self.name, self.blocks, self.threads, 0, *inputs, *outputs, *targets)


def write_kernel(outputs: Sequence[Value], updates: Sequence[Update], formulas: Formulas, name: str) -> Kernel:
    """A kernel for outputs that have formulas, and for updates; what has no formula lies in memory.

    What is updated is read by nobody else. GlqError if there cannot be such a kernel.
    """
    inputs: dict[Value, str] = {}
    parts = [_output(out, f"out{i}", formulas, inputs) for i, out in enumerate(outputs)]
    parts += [_Update(update, f"out{len(outputs) + i}", formulas, inputs) for i, update in enumerate(updates)]
    targets = [update.target.root for update in updates]
    written = [*outputs, *targets]
    halves = {v.dtype for v in (*inputs, *written, *formulas)} & {torch.float16, torch.bfloat16}
    if len(halves) > 1:
        raise GlqError("a kernel computes in fp16 or in bf16")
    threads = 512 if any(p.widest >= _WIDE for p in parts) else 256
    body, first = "", 0
    for part in parts:
        blocks = part.blocks(threads)
        body += part.text(first, blocks)
        first += blocks
    parameters = [f"const {_in_memory(v)}* {p}" for v, p in inputs.items()]
    parameters += [f"{_in_memory(v)}* out{i}" for i, v in enumerate(written)]
    text = (
        f'extern "C" __global__ void __launch_bounds__(THREADS)\n{name}({", ".join(parameters)}) {{\n'
        f"  let_next_start();\n  wait_for_previous();\n{body}}}\n"
    )
    macros = (("BF16", int(torch.float16 not in halves)), ("THREADS", threads))
    source = nvrtc.Source(("ops/ptx.cuh", "step/kernel.cuh"), macros, text=text)
    return Kernel(source, name, first, threads, tuple(inputs), tuple(outputs), tuple(targets))


@dataclass
class _Loop:
    """Code that is run for each `variable`, a place: of an element of the output, or along what is reduced."""

    variable: str
    parent: "_Loop | None" = None
    size: int = 0  # of a reduction
    places: dict[str, str] = field(default_factory=dict)  # expressions of whole numbers, and their names
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[Value, str], str] = field(default_factory=dict)  # elements that have been computed

    def definitions(self) -> str:
        return " ".join(f"const int {name} = {text};" for text, name in self.places.items())


class _Output:
    """The part of a kernel that computes one output."""

    def __init__(
        self, out: Value, pointer: str, formulas: Formulas, inputs: dict[Value, str], cols: int | None = None
    ) -> None:
        """cols: of a row, where something is reduced; None: the last dimension."""
        self._out, self._pointer, self._formulas, self._inputs = out, pointer, formulas, inputs
        self.widest = 0
        self._names = 0
        self._reduced: dict[tuple[Value, bytes], str] = {}
        self._ahead: list[str] = []  # reductions
        _require_dense(out)
        self._size = prod(out.shape)
        self._cols = cols or (out.shape[-1] if out.shape and out.stride[-1] == 1 else 1)
        self._body = _Loop("i")
        self._result = self._element(out, "i", self._body)

    def blocks(self, threads: int) -> int:
        return self._size // self._cols if self._reduced else min(-(-self._size // threads), _MOST_BLOCKS)

    def text(self, first: int, blocks: int) -> str:
        """Its code, for blocks from `first` on."""
        stored = f"to16({self._result})" if _in_memory(self._out) == "u16" else self._result
        store = self._store(stored)
        element = "\n      ".join([self._body.definitions(), *self._body.lines, store])
        if self._reduced:
            head = f"const int row = blockIdx.x - {first};\n    float {', '.join(self._reduced.values())};\n"
            head += "".join(f"    {text}\n" for text in self._ahead)
            start, end, step = f"row * {self._cols} + threadIdx.x", f"(row + 1) * {self._cols}", "THREADS"
        else:
            head = ""
            start, end = f"(blockIdx.x - {first}) * THREADS + threadIdx.x", f"{self._size}"
            step = f"{blocks} * THREADS"
        return (
            f"  if (blockIdx.x >= {first} && blockIdx.x < {first + blocks}) {{\n    {head}"
            f"    for (int i = {start}; i < {end}; i += {step}) {{\n      {element}\n    }}\n  }}\n"
        )

    def _store(self, element: str) -> str:
        return f"{self._pointer}[i] = {element};"

    # ---- elements ----

    def _element(self, value: Value, at: str, loop: _Loop) -> str:
        """The name of the element of a root that is `at` places after its first."""
        known = loop.known.get((value, at))
        if known is None:
            known = loop.known[value, at] = self._new_element(value, at, loop)
        return known

    def _new_element(self, value: Value, at: str, loop: _Loop) -> str:
        formula = self._formulas.get(value)
        kind = C_TYPES[value.dtype]
        if formula is None:
            pointer = self._inputs.setdefault(value, f"in{len(self._inputs)}")
            loaded = f"{pointer}[{at}]"
            text = f"from16({loaded})" if _in_memory(value) == "u16" else f"({kind}){loaded}"
        elif isinstance(formula, Reduction):
            return self._reduction(value, formula, at, loop)
        elif isinstance(formula, Concatenation):
            text = self._concatenation(value, formula, at, loop)
        else:
            operands = zip(formula.operands, formula.types, strict=True)
            names = [self._operand(x, dtype, value, at, loop) for x, dtype in operands]
            text = _converted(f"({formula.text.format(*names)})", None, value.dtype)
        name = self._name("v")
        loop.lines.append(f"const {kind} {name} = {text};")
        return name

    def _operand(self, x: Value | float, dtype: torch.dtype, out: Value, at: str, loop: _Loop) -> str:
        if not isinstance(x, Value):
            return literal(x, dtype)
        if _same_places(x, out):
            place = self._place(f"{at} + {x.offset}" if x.offset else at, loop)
        else:
            place = self._place_of(x, self._index(out, at, loop)[len(out.shape) - len(x.shape) :], loop)
        return _converted(self._element(x.root, place, loop), x.dtype, dtype)

    def _concatenation(self, out: Value, formula: Concatenation, at: str, loop: _Loop) -> str:
        index = self._index(out, at, loop)
        dim, start, text = formula.dim, 0, ""
        for i, part in enumerate(formula.parts):  # every part's element is loaded, from a place that it has
            size = part.shape[dim]
            own = f"min(max({index[dim]} - {start}, 0), {size - 1})"
            place = self._place_of(part, [*index[:dim], own, *index[dim + 1 :]], loop)
            start += size
            name = self._element(part.root, place, loop)
            text += name if i + 1 == len(formula.parts) else f"{index[dim]} < {start} ? {name} : "
        return text

    def _reduction(self, value: Value, formula: Reduction, at: str, loop: _Loop) -> str:
        rows = self._rows_at(at, loop)
        name = self._reduced.get((value, rows))
        if name is not None:
            return name
        x = formula.operand
        inner = _Loop(self._name("j"), loop, x.shape[-1])
        index = self._index(value, at, loop)[: len(x.shape) - 1]
        operand = self._element(x.root, self._place_of(x, [*index, inner.variable], inner), inner)
        name = self._reduced[value, rows] = self._name("sum")
        self.widest = max(self.widest, inner.size)
        total = _converted(f"(block_sum({name}) * {formula.factor})", torch.float32, value.dtype)
        j = inner.variable
        each = "\n        ".join([inner.definitions(), *inner.lines, f"{name} += {operand};"])
        self._ahead.append(
            f"{{\n      {self._first(loop)}\n      {name} = 0;\n"
            f"      for (int {j} = threadIdx.x; {j} < {inner.size}; {j} += THREADS) {{\n        {each}\n      }}\n"
            f"      {name} = {total};\n    }}"
        )
        return name

    # ---- places: expressions that are C++ and Python ----

    def _place(self, text: str, loop: _Loop) -> str:
        if text.isidentifier() or text.isdigit():
            return text
        return loop.places.setdefault(text, f"n{len(loop.places)}_{loop.variable}")

    def _index(self, value: Value, at: str, loop: _Loop) -> list[str]:
        """The index in each dimension of the element that is `at` places after the first."""
        _require_dense(value)
        index = ["0"] * len(value.shape)
        dims = sorted((d for d, size in enumerate(value.shape) if size > 1), key=lambda d: -value.stride[d])
        for i, d in enumerate(dims):
            text = at if value.stride[d] == 1 else f"{at} / {value.stride[d]}"
            index[d] = self._place(text if i == 0 else f"({text}) % {value.shape[d]}", loop)
        return index

    def _place_of(self, x: Value, index: list[str], loop: _Loop) -> str:
        """How far after its root's first an element is; an index is left out where there is but one."""
        terms = [
            f"({i}) * {stride}"
            for i, size, stride in zip(index, x.shape, x.stride, strict=True)
            if size > 1 and i != "0" and stride
        ]
        return self._place(" + ".join([*terms, str(x.offset)] if x.offset or not terms else terms), loop)

    def _rows_at(self, at: str, loop: _Loop) -> bytes:
        """A place in each row of the output. GlqError if it differs within a row."""
        if self._size > _MOST_ROWS:
            raise GlqError(f"reductions for {self._size} elements are not worth a kernel")
        i = np.arange(self._size).reshape(-1, self._cols)
        values: dict[str, Any] = {"i": i if loop is self._body else i[:, :1], "min": np.minimum, "max": np.maximum}
        for each in _from_outermost(loop):
            if each is not self._body:
                values[each.variable] = np.arange(each.size)[None] if each is loop else 0
            for text, name in each.places.items():
                values[name] = _evaluate(text, values)
        places = np.atleast_2d(_evaluate(at, values))
        if (places != places[:, :1]).any():
            raise GlqError("a kernel reduces once a row")
        return np.broadcast_to(places[:, :1], (len(i), 1)).tobytes()

    def _first(self, loop: _Loop) -> str:
        """The places of a row's first element."""
        return " ".join(
            f"const int {each.variable} = {f'row * {self._cols}' if each is self._body else 0}; {each.definitions()}"
            for each in _from_outermost(loop)
        )

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"


def _output(out: Value, pointer: str, formulas: Formulas, inputs: dict[Value, str]) -> _Output:
    """With a block a row or, if what is reduced differs within a row, one an element."""
    before = dict(inputs)
    try:
        return _Output(out, pointer, formulas, inputs)
    except GlqError:
        if prod(out.shape) > _MOST_BLOCKS:
            raise
        inputs.clear()
        inputs.update(before)
        return _Output(out, pointer, formulas, inputs, cols=1)


class _Update(_Output):
    """The part that changes a tensor in place."""

    def __init__(self, update: Update, pointer: str, formulas: Formulas, inputs: dict[Value, str]) -> None:
        self._update = update
        _require_dense(update.target.root)
        strides = tuple(prod(update.shape[d + 1 :]) for d in range(len(update.shape)))
        elements = Value(update.shape, strides, update.target.dtype, update.target.device)
        super().__init__(elements, pointer, formulas | {elements: update.formula}, inputs)

    def _store(self, element: str) -> str:
        target, dim, index = self._update.target, self._update.dim, self._update.index
        places = self._index(self._out, "i", self._body)
        if index is None:
            return f"{self._pointer}[{self._place_of(target, places, self._body)}] = {element};"
        chosen = self._element(index.root, self._place_of(index, [places[dim]], self._body), self._body)
        rest = self._place_of(target, [*places[:dim], "0", *places[dim + 1 :]], self._body)
        return (
            f"if ({chosen} < 0 || {chosen} >= {target.shape[dim]}) __trap();\n      "
            f"{self._pointer}[{rest} + {chosen} * {target.stride[dim]}] = {element};"
        )


def _from_outermost(loop: _Loop) -> list[_Loop]:
    return [*(_from_outermost(loop.parent) if loop.parent else []), loop]


def _evaluate(text: str, values: dict[str, Any]) -> Any:
    """The value of a place: whole numbers, of which none is negative where it is divided."""
    return eval(text.replace("/", "//"), {"__builtins__": {}}, values)


def _same_places(x: Value, out: Value) -> bool:
    """Whether elements of one index are as far from each other in both."""
    return x.shape == out.shape and all(
        a == b for a, b, size in zip(x.stride, out.stride, x.shape, strict=True) if size > 1
    )


def _require_dense(value: Value) -> None:
    """GlqError if there are holes between a tensor's elements, or too many of these for an int."""
    expected = 1
    for stride, size in sorted((st, size) for st, size in zip(value.stride, value.shape, strict=True) if size > 1):
        if stride != expected:
            raise GlqError("a kernel writes tensors without holes")
        expected *= size
    if expected >= 2**31:
        raise GlqError("a kernel counts elements in 32 bits")


def _in_memory(value: Value) -> str:
    return _IN_MEMORY.get(value.dtype, C_TYPES[value.dtype])


def _converted(text: str, have: torch.dtype | None, want: torch.dtype) -> str:
    """An expression for `have` (None: of any type, not yet rounded), as one for `want`."""
    if have == want:
        return text
    if want in (torch.float16, torch.bfloat16):
        return f"round16((float){text})"
    return f"({C_TYPES[want]}){text}"
