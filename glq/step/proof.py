"""Whether a program may take the place of the step that it was made from.

It may not where kernels run that PyTorch does not know of, or where numbers went through Python: done once more, with
other inputs, the recorded calls then give something else than the model. Most models give the same bits each time, and
then so do their calls. Where libraries' kernels do not, two ways are compared as two runs of the model are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from glq.step.program import Memory, Program, make, name_of
from glq.step.record import Call, Recording, Value, record

_SMALL = 1 << 20  # bytes: a tensor that is copied before the step is done again
_OVERWRITING = [  # what it writes does not depend on what was there
    torch.ops.aten.index_copy_.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.zero_.default,
]


@dataclass(frozen=True)
class Proof:
    """output: of the step, which was done once, as far as anybody sees."""

    output: Any
    right: bool
    remark: str = ""  # how the two differ
    again: Recording | None = None  # where its calls were others than those of the program


@torch.no_grad()
def prove(program: Program, step: Callable[[], Any]) -> Proof:
    """Do a step on the memory of the recorded one both ways; the program's faster kernels are tried out beside it."""
    reason, before = _state(program.recording)
    if reason:
        return Proof(step(), False, reason)
    try:
        ours = program.run(check=True)
    except Exception as error:  # noqa: BLE001 (whatever calls raise that are made in another way)
        _restore(before)
        return Proof(step(), False, f"its calls cannot be made again: {error}")
    _restore(before)
    expected = step()
    if _distance(ours, expected) == 0:
        return Proof(expected, True)
    _restore(before)
    replayed = _replay(program.recording)
    _restore(before)
    return _compare(program.recording, ours, expected, replayed, step)


def _compare(
    recording: Recording, ours: Any, expected: Any, replayed: dict[Call, list[Tensor]], step: Callable[[], Any]
) -> Proof:
    """Where they differ, with the step done once more: is it the same calls, and how far is it from itself?"""
    marks: dict[Call, list[Tensor]] = {}
    output, again = record(step, lambda call, made: marks.update({call: [_mark(x) for x in made]}))
    other = difference(recording, again)
    if other:
        return Proof(output, False, f"its calls are not the same each time: {other}", again)
    error, own = _distance(ours, expected), _distance(output, expected)
    floats = [x.dtype for x in _tensors(expected) if x.is_floating_point()]
    bound = max([4 * own, *(8 * torch.finfo(dtype).eps for dtype in floats)])
    pairs = zip(recording.calls, again.calls, strict=True)
    names = [name_of(a) for a, b in pairs if a in replayed and not _same_marks(replayed[a], marks[b])]
    remark = (
        f"done again, it is not the same: {error:.2g} from what the model gives (at most {bound:.2g}), "
        f"which is {own:.2g} from what it gives once more"
    )
    if names:
        remark += f"; first at {names[0]}, then at {len(names) - 1} more of {len(recording.calls)} calls"
    return Proof(output, error <= bound, remark)


def difference(recording: Recording, again: Recording) -> str:
    """Where two recordings part; "": they have the same calls, with the same numbers and tensors."""
    same: dict[Value, Value] = {}

    def are_same(a: Any, b: Any) -> bool:
        if not isinstance(a, Value) or not isinstance(b, Value):
            return type(a) is type(b) and bool(a == b)
        if a not in same:
            same[a] = b
            x, y = recording.given.get(a), again.given.get(b)
            if (x is None) != (y is None) or _kind(a) != _kind(b):
                return False
            if x is not None and y is not None and x.data_ptr() != y.data_ptr():  # made by the step, or from a number
                return torch.equal(x, y)
        return same[a] is b

    for a, b in zip(recording.calls, again.calls, strict=False):
        leaves, others = (tree_leaves((c.function, c.args, c.kwargs, c.output)) for c in (a, b))
        if len(leaves) != len(others) or not all(map(are_same, leaves, others)):
            return f"{name_of(a)}, then {name_of(b)}"
    found, expected = len(again.calls), len(recording.calls)
    return "" if found == expected else f"{expected} calls, then {found}"


def _kind(value: Value) -> tuple[Any, ...]:
    return value.shape, value.stride, value.dtype, value.device, value.offset


def _state(recording: Recording) -> tuple[str, dict[Tensor, Tensor]]:
    """What the step changes, and copies of it; or why that cannot be undone."""
    written = {v for call in recording.calls for v in call.writes if v in recording.given}
    for call in recording.calls:
        large = any(v in written and recording.given[v].nbytes > _SMALL for v in call.writes)
        if large and call.function not in _OVERWRITING:
            return f"{name_of(call)} changes too large a tensor", {}
    small = [x for v in written if (x := recording.given[v]).nbytes <= _SMALL]
    return "", {x: x.clone() for x in small}


def _restore(before: dict[Tensor, Tensor]) -> None:
    for x, old in before.items():
        x.copy_(old)


def _replay(recording: Recording) -> dict[Call, list[Tensor]]:
    """The recorded calls, made in their order: marks of what they make."""
    memory = Memory(recording.given)
    last = {v.root: call for call in recording.calls for v in (*call.reads, *call.makes)}
    marks = {}
    for call in recording.calls:
        if call.is_view:
            continue
        marks[call] = [_mark(x) for x in make(call, memory)]
        memory.forget(v for v in {r.root for r in call.reads} if last[v] is call and v not in recording.given)
    return marks


def _mark(x: Tensor) -> Tensor:
    """A number that another tensor hardly has: a sum of its bits."""
    return x.contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)


def _same_marks(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def _distance(ours: Any, theirs: Any) -> float:
    """Between what two steps return, relative to the latter: the largest of its tensors'. 0: bit for bit the same."""
    xs, ys = _tensors(ours), _tensors(theirs)
    if [(x.shape, x.dtype) for x in xs] != [(y.shape, y.dtype) for y in ys]:
        return torch.inf
    distances = [0.0]
    for x, y in zip(xs, ys, strict=True):
        if not torch.equal(x, y):
            apart = (x.double() - y.double()).norm() / y.double().norm() if y.is_floating_point() else torch.inf
            distances.append(float(apart) if float(apart) == float(apart) else torch.inf)
    return max(distances)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
