"""What PyTorch does for one step of a model, as a list of calls that can be made again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the step. There is one for each: compared by identity."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    view_of: "Value | None" = None  # whose memory it has; None: its own
    offset: int = 0  # elements from the first of view_of to its own first

    @property
    def root(self) -> "Value":
        return self.view_of or self


@dataclass(frozen=True, eq=False)
class Call:
    """A function, and its arguments and results, in which values stand for tensors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]  # roots of what it changes in place
    makes: tuple[Value, ...]  # tensors with memory of their own

    @property
    def is_view(self) -> bool:
        """Whether it does nothing but name parts of a tensor."""
        parts = tree_leaves(self.output)
        return not self.makes and not self.writes and bool(parts) and all(isinstance(p, Value) for p in parts)


@dataclass
class Recording:
    """A step: its calls, tensors from outside of it (weights, caches, inputs), and what it returns."""

    calls: list[Call] = field(default_factory=list)
    given: dict[Value, Tensor] = field(default_factory=dict)
    output: Any = None
    refusal: str = ""  # why the calls do not tell all of it

    def readers(self) -> dict[Value, set[Call]]:
        """Of each root. Views read nothing."""
        found: dict[Value, set[Call]] = {}
        for call in self.calls:
            for v in () if call.is_view else call.reads:
                found.setdefault(v.root, set()).add(call)
        return found

    @property
    def kept(self) -> set[Value]:
        """Roots of what it returns."""
        return {v.root for v in values_in(self.output)}

    def memory(self, roots: Iterable[Value]) -> set[Any]:
        """What tells memory from other memory: two tensors from outside may lie in the same."""
        return {self.given[v].untyped_storage().data_ptr() if v in self.given else v for v in roots}


def values_in(tree: Any) -> tuple[Value, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Value))


def record(step: Callable[[], Any], seen: Callable[[Call, list[Tensor]], None] | None = None) -> tuple[Any, Recording]:
    """What `step` returns, and how it came about. seen: is told each call and the tensors that it made."""
    recorder = _Recorder(seen)
    with torch.no_grad(), _WholeAttention(recorder), recorder:
        output = step()
    recording = recorder.recording
    recording.output = tree_map(lambda x: recorder.value(x) if isinstance(x, Tensor) else x, output)
    _keep_constants(recording, recorder.made)
    return output, recording


class _Recorder(TorchDispatchMode):
    def __init__(self, seen: Callable[[Call, list[Tensor]], None] | None = None) -> None:
        super().__init__()
        self._seen = seen
        self.recording = Recording()
        self.made: dict[Value, Tensor] = {}  # without any tensor as input
        self.quiet = False
        self._values = WeakTensorKeyDictionary()  # weak: the memory of a step is free again as it goes on

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = op(*args, **kwargs)
        if not self.quiet:
            by_name = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
            writes = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            self.note(op, args, kwargs, output, [by_name[name] for name in writes if name in by_name])
        return output

    def note(self, function: Callable[..., Any], args: Any, kwargs: Any, output: Any, changed: list[Any]) -> None:
        """Add a call."""
        given = _tensors((args, kwargs))
        values = [self.value(x) for x in given]
        named_args, named_kwargs = tree_map(lambda x: self.value(x) if isinstance(x, Tensor) else x, (args, kwargs))
        results = _tensors(output)
        new = [x for x in results if x not in self._values]
        made = []
        for x in new:
            view_of = next((t for t in given if _storage(t) == _storage(x)), None)
            self._values[x] = self._describe(x, view_of)
            if view_of is None:
                made.append(x)
        if len({_storage(x) for x in made}) < len(made):
            self.recording.refusal = f"results of {function} share memory"
        makes = tuple(self._values[x] for x in made)
        writes = tuple(self.value(x).root for x in _tensors(changed))
        named_output = tree_map(lambda x: self.value(x) if isinstance(x, Tensor) else x, output)
        call = Call(function, named_args, named_kwargs, named_output, tuple(values), writes, makes)
        self.recording.calls.append(call)
        if self._seen is not None:
            quiet, self.quiet = self.quiet, True
            self._seen(call, made)
            self.quiet = quiet
        if not given:
            self.made |= zip(makes, made, strict=True)

    def value(self, x: Tensor) -> Value:
        """The one of a tensor; a tensor that no call has made is from outside."""
        if x not in self._values:
            self._values[x] = found = self._describe(x, None)
            self.recording.given[found] = x
        return self._values[x]

    def _describe(self, x: Tensor, view_of: Tensor | None) -> Value:
        if type(x) not in (Tensor, Parameter) or x.layout != torch.strided:
            self.recording.refusal = f"tensors of type {type(x).__name__} may do more than their calls say"
            return Value(tuple(x.shape), (), x.dtype, x.device)
        kind = (tuple(x.shape), x.stride(), x.dtype, x.device)
        if view_of is None:
            return Value(*kind)
        viewed = self._values[view_of]
        if viewed.dtype != x.dtype:
            self.recording.refusal = f"memory of {viewed.dtype} is read as {x.dtype}"
        return Value(*kind, viewed.root, viewed.offset + x.storage_offset() - view_of.storage_offset())


class _WholeAttention(TorchFunctionMode):
    """Attention as one call: what it is made of differs from one GPU and shape to the next."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or self._recorder.quiet:
            return func(*args, **kwargs)
        self._recorder.quiet = True
        try:
            output = func(*args, **kwargs)
        finally:
            self._recorder.quiet = False
        self._recorder.note(func, args, kwargs, output, [])
        return output


def _keep_constants(recording: Recording, made: dict[Value, Tensor]) -> None:
    """Drop calls without inputs whose results nobody changes: they are the same each time."""
    changed = {v for call in recording.calls for v in call.writes}
    for call in list(recording.calls):
        random = torch.Tag.nondeterministic_seeded in getattr(call.function, "tags", ())
        if call.makes and not call.reads and changed.isdisjoint(call.makes) and not random:
            recording.given |= {v: made[v] for v in call.makes}
            recording.calls.remove(call)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.untyped_storage()._cdata
