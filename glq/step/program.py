"""A recorded step, made faster: small operations in kernels that do many of them or that multiply, and attention."""

import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from glq import nvrtc
from glq.errors import GlqError
from glq.ops import cuda_attention
from glq.step.attention import Attention, attention
from glq.step.formulas import Update, formula
from glq.step.kernel import Formulas, Kernel, write_kernel
from glq.step.products import Product, products
from glq.step.record import Call, Recording, Value
from glq.step.rounding import close, close_products


class Memory:
    """Tensors of a step, while they are needed."""

    def __init__(self, given: dict[Value, Tensor]) -> None:
        self._tensors = dict(given)

    def get(self, value: Value) -> Tensor:
        root = self._tensors[value.root]
        if value.view_of is None:
            return root
        return root.as_strided(value.shape, value.stride, root.storage_offset() + value.offset)

    def put(self, value: Value, tensor: Tensor) -> None:
        self._tensors[value] = tensor

    def beside(self, tensors: dict[Value, Tensor]) -> "Memory":
        """The same with others in the place of some."""
        return Memory(self._tensors | tensors)

    def forget(self, values: Iterable[Value]) -> None:
        for value in values:
            self._tensors.pop(value, None)

    def fill_in(self, tree: Any) -> Any:
        return tree_map(lambda x: self.get(x) if isinstance(x, Value) else x, tree)


class Work(Protocol):
    """What makes tensors in the place of calls."""

    @property
    def outputs(self) -> tuple[Value, ...]: ...

    @property
    def targets(self) -> tuple[Value, ...]:
        """What it changes in place."""

    @property
    def products(self) -> tuple[Value, ...]:
        """Outputs that sum many differences of rounding."""

    def run(self, memory: Memory) -> tuple[Tensor, ...]:
        """The outputs."""


class Fused:
    """A kernel for small operations; None where nothing needs what they make."""

    products: tuple[Value, ...] = ()

    def __init__(self, kernel: Kernel | None, gpu: nvrtc.Launcher) -> None:
        self.outputs = kernel.outputs if kernel else ()
        self.targets = kernel.targets if kernel else ()
        self.kernel = kernel
        self._gpu = gpu

    def run(self, memory: Memory) -> tuple[Tensor, ...]:
        outputs = tuple(_new(v) for v in self.outputs)
        if self.kernel:
            inputs, targets = ([memory.get(v) for v in vs] for vs in (self.kernel.inputs, self.targets))
            self.kernel.launch(inputs, outputs, targets, self._gpu)
        return outputs


class Attending:
    """The kernel for attention."""

    targets: tuple[Value, ...] = ()
    products: tuple[Value, ...] = ()

    def __init__(self, what: Attention, gpu: nvrtc.Launcher) -> None:
        self.outputs: tuple[Value, ...] = (what.out,)
        self.what, self._gpu = what, gpu

    def run(self, memory: Memory) -> tuple[Tensor, ...]:
        w, out = self.what, _new(self.what.out)
        mask = None if w.mask is None else memory.get(w.mask)
        cuda_attention.attend(memory.get(w.q), memory.get(w.k), memory.get(w.v), mask, w.scale, out, self._gpu)
        return (out,)


class Multiplying:
    """A product that makes its x."""

    targets: tuple[Value, ...] = ()

    def __init__(self, what: Product) -> None:
        self.outputs, self.products = what.outputs, what.outputs[:1]
        self.what = what

    def run(self, memory: Memory) -> tuple[Tensor, ...]:
        made = self.what.function(*memory.fill_in(self.what.args))
        return made if isinstance(made, tuple) else (made,)


def make(call: Call, memory: Memory) -> list[Tensor]:
    """Have PyTorch do it; what it makes."""
    output = call.function(*memory.fill_in(call.args), **memory.fill_in(call.kwargs))
    made = []
    for value, tensor in zip(tree_leaves(call.output), tree_leaves(output), strict=True):
        if value in call.makes:
            memory.put(value, tensor)
            made.append(tensor)
    return made


class Part:
    """Calls, one after the other, and what does their work faster, if anything does."""

    def __init__(self, calls: list[Call], work: Work | None = None) -> None:
        self.calls, self.work = calls, work
        self.last: tuple[Value, ...] = ()  # what nobody needs afterwards

    def run(self, memory: Memory) -> None:
        if self.work is None:
            self.run_calls(memory)
        else:
            for value, tensor in zip(self.work.outputs, self.work.run(memory), strict=True):
                memory.put(value, tensor)

    def run_calls(self, memory: Memory) -> None:
        for call in self.calls:
            make(call, memory)

    def check(self, memory: Memory) -> None:
        """As run_calls; the work is dropped, with a warning, if it does not do the same."""
        copies = {v: memory.get(v).clone() for v in self.work.targets} if self.work else {}
        self.run_calls(memory)
        if self.work is None:
            return
        try:
            made = self.work.run(memory.beside(copies))
            for value, tensor in [*zip(self.work.outputs, made, strict=True), *copies.items()]:
                expected = memory.get(value)
                is_close = close_products if value in self.work.products else close
                if not is_close(tensor, expected):
                    apart = (tensor.double() - expected.double()).norm() / expected.double().norm()
                    raise GlqError(f"it computes something else than PyTorch, {apart.item():.2g} of its size away")
        except Exception as error:  # noqa: BLE001 (cuda-core, NVRTC and the driver have kinds of their own)
            warnings.warn(f"a kernel for {_names(self.calls)} is not used: {error}", stacklevel=2)
            self.work = None


class Program:
    """A step that can be done again, on the same caches and the same memory for its inputs."""

    def __init__(self, recording: Recording, gpu: nvrtc.Launcher) -> None:
        if recording.refusal:
            raise GlqError(recording.refusal)
        self.recording = recording
        self.parts = _parts(recording, gpu)

    @torch.no_grad()
    def run(self, check: bool = False) -> Any:
        """What the step returns. check: by PyTorch's calls, beside which each part's faster work is tried out."""
        memory = Memory(self.recording.given)
        for part in self.parts:
            if check:
                part.check(memory)
            else:
                part.run(memory)
            memory.forget(part.last)
        return memory.fill_in(self.recording.output)


def _parts(recording: Recording, gpu: nvrtc.Launcher) -> list[Part]:
    """Runs of calls that have formulas become kernels; others stay, or are attention or products with their x."""
    groups = _groups(recording, gpu)
    end = len(groups)
    used: dict[Value, int] = {}  # the last group that needs it
    for i, (calls, work) in enumerate(groups):
        used |= {v.root: i for v in (work.what.reads if work else calls[0].reads)}
    used |= dict.fromkeys(recording.kept, end)

    parts: list[Part] = []
    run = _Run(recording, [])

    def close(before: int, with_late: bool = False) -> None:
        nonlocal run
        outputs = [v for v in run.formulas if used.get(v, -1) >= before]
        late = run.later
        if outputs or len(run.updates) > len(run.late) or with_late:
            if run.calls:
                parts.append(Part(run.calls, _fused(outputs, run, gpu)))
        else:
            late = run.late + late
            if own := run.calls[len(run.late) :]:
                parts.append(Part(own, Fused(None, gpu)))
        run = _Run(recording, late)

    for i, (calls, work) in enumerate(groups):
        call = calls[0]
        found = None if work else formula(call)
        if found is None or (isinstance(found, Update) and not found.is_local(call)):
            close(i)
            if any(run.touches(each) for each in calls):
                close(i, with_late=True)
            parts.append(Part(calls, work))
        elif isinstance(found, Update) and run.can_delay(call):
            run.delay(call, found)
        else:
            while not run.takes(call, found):
                close(i, with_late=True)
            run.add(call, found)
    close(end, with_late=True)
    close(end, with_late=True)
    _schedule(parts, recording)
    return parts


class _Run:
    """Small calls, one after the other, for one kernel, in which no block waits for what another one writes.

    late: updates that can be done at any time before somebody reads what they change: they wait for a kernel.
    """

    def __init__(self, recording: Recording, late: list[tuple[Call, Update]]) -> None:
        self.calls: list[Call] = []
        self.formulas: Formulas = {}
        self.updates: list[Update] = []
        self.late, self.later = late, list[tuple[Call, Update]]()
        self._memory = recording.memory
        self._read: set[Any] = set()
        self._written: set[Any] = set()
        for each in late:
            self.add(*each)

    def takes(self, call: Call, found: Any) -> bool:
        """Whether nothing is read that was written, and nothing written that was read or made."""
        reads, writes = self._memory(v.root for v in call.reads), self._memory(call.writes)
        made = isinstance(found, Update) and found.target.root in self.formulas
        return not made and not reads & self._written and not writes & self._read

    def add(self, call: Call, found: Any) -> None:
        self.calls.append(call)
        if isinstance(found, Update):
            self.updates.append(found)
        else:
            self.formulas[call.makes[0]] = found
        writes = self._memory(call.writes)
        self._read |= self._memory(v.root for v in call.reads) - writes
        self._written |= writes

    def can_delay(self, call: Call) -> bool:
        """Whether it only changes what is read here already, by numbers: the next kernel can do it."""
        writes = self._memory(call.writes)
        return len(call.reads) == 1 and bool(writes & self._read) and not writes & self._written

    def delay(self, call: Call, found: Update) -> None:
        self.later.append((call, found))
        self._written |= self._memory(call.writes)  # nobody reads it until then

    def touches(self, call: Call) -> bool:
        return bool(self._memory((*call.writes, *(v.root for v in call.reads))) & (self._written | self._read))


def _groups(recording: Recording, gpu: nvrtc.Launcher) -> list[tuple[list[Call], Attending | Multiplying | None]]:
    """The calls in their order, those of one product or attention together at the place of the last."""
    calls = [call for call in recording.calls if not call.is_view]
    works: list[Attending | Multiplying] = [*_attentions(calls, recording, gpu)]
    works += map(Multiplying, products(recording, gpu))
    of_last = {work.what.calls[-1]: work for work in works}
    ahead = {call for work in works for call in work.what.calls[:-1]}
    groups: list[tuple[list[Call], Attending | Multiplying | None]] = []
    for call in calls:
        if call not in ahead:
            work = of_last.get(call)
            groups.append((list(work.what.calls) if work else [call], work))
    return groups


def _attentions(calls: list[Call], recording: Recording, gpu: nvrtc.Launcher) -> list[Attending]:
    found = []
    unchanged = 0  # the first call since which nothing is changed in place
    readers, kept = recording.readers(), recording.kept
    for i, call in enumerate(calls):
        if call.writes:
            unchanged = i + 1
        own = (c for c in calls[unchanged:i] if all(readers.get(v) == {call} and v not in kept for v in c.makes))
        what = attention(call, own)
        if what is not None and not _refusal(what):
            found.append(Attending(what, gpu))
    return found


def _refusal(what: Attention) -> str:
    """Why the kernel does not take it: seen before there is memory, the rest of which only a check can tell."""
    q, k, v, mask = (
        None if x is None else torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")
        for x in (what.q, what.k, what.v, what.mask)
    )
    assert q is not None
    assert k is not None
    assert v is not None
    return cuda_attention.refusal(q, k, v, mask)


def _fused(outputs: list[Value], run: _Run, gpu: nvrtc.Launcher) -> Fused | None:
    if not outputs and not run.updates:
        return Fused(None, gpu)
    try:
        return Fused(write_kernel(outputs, run.updates, run.formulas, "fused_" + _names(run.calls)[:60]), gpu)
    except GlqError:
        return None


def _schedule(parts: list[Part], recording: Recording) -> None:
    """When memory is free again: PyTorch's calls, too, need to find what they read."""
    last: dict[Value, int] = {}
    for i, part in enumerate(parts):
        for call in part.calls:
            last |= dict.fromkeys(call.makes, i) | {v.root: i for v in call.reads}
    kept = recording.kept | set(recording.given)
    for value, i in last.items():
        if value not in kept:
            parts[i].last += (value,)


def name_of(call: Call) -> str:
    return getattr(call.function, "__name__", "call")


def _names(calls: list[Call]) -> str:
    names = [name_of(call).partition(".")[0].strip("_") for call in calls]
    return "_".join(dict.fromkeys(names))


def _new(value: Value) -> Tensor:
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
