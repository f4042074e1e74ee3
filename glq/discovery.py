"""What is to be found out by running a model: how it calls its blocks, and which of their layers read the same input.

No list of architectures: a block is called as the model calls it, and hooks see what its layers get.
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glq.attention import OneHeadEach
from glq.errors import GlqError
from glq.experts import DenseExperts, quantizable
from glq.source import SourceModel

Output = Callable[[Tensor], Any]  # what a block returns for its hidden states
_OUTPUTS: tuple[Output, ...] = (lambda x: x, lambda x: (x, None), lambda x: (x,), lambda x: (x, None, None))


@dataclass
class Call:
    """How the model calls a block: what follows the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def copied(calls: Sequence[Call]) -> list[Call]:
    """The calls of one pass over all blocks, with containers of their own, in which blocks leave each other tensors.

    Gemma's later layers read keys and values of earlier ones that way: a second model must not find those of the first.
    """
    made: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, MutableMapping | MutableSequence):
            return value
        if id(value) not in made:
            made[id(value)] = copy.copy(value)
        return made[id(value)]

    return [Call(tuple(map(own, c.args)), {key: own(value) for key, value in c.kwargs.items()}) for c in calls]


@torch.no_grad()
def capture(
    source: SourceModel, batches: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[list[Call]]]:
    """For each batch of tokens [batch, ctx]: the first block's input [batch, ctx, hidden], and each block's call.

    The blocks themselves are stubs here: whatever a model computes once and hands to its blocks (rotary embeddings,
    masks, one kind a layer type) is found without knowing the architecture. GlqError for a model that goes on with
    other hidden states than its blocks return.
    """
    with source.outside_blocks(device, dtype, batches) as model:
        for output in _OUTPUTS:
            try:
                found = [_pass(source, model, tokens.to(device), output) for tokens in batches[:1]]
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, KeyError) as error:
                failed = error
                continue
            if all(hidden is not None for hidden, _ in found):
                found += [_pass(source, model, tokens.to(device), output) for tokens in batches[1:]]
                source.block_output = output
                return [hidden for hidden, _ in found if hidden is not None], [calls for _, calls in found]
            failed = ValueError("blocks are not called once each, in their order, with what the one before returned")
    kind = source.config.model_type
    raise GlqError(f"the decoder blocks of a {kind!r} model cannot be run on their own: {_first_line(failed)}")


def _pass(source: SourceModel, model: Any, tokens: Tensor, output: Output) -> tuple[Tensor | None, list[Call]]:
    """The first block's input, and each block's call; no input if hidden states went another way than expected."""
    seen: list[tuple[str, Tensor]] = []
    calls: list[Call] = []

    def stub(name: str) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: object, **kwargs: object) -> Any:
            seen.append((name, hidden))
            calls.append(Call(args, kwargs))
            return output(hidden)

        return forward

    with _stubbed(source, stub):
        model.base_model(input_ids=tokens, use_cache=False)
    in_order = [name for name, _ in seen] == source.blocks
    alike = all(isinstance(x, Tensor) and x.shape == seen[0][1].shape for _, x in seen)
    return (seen[0][1] if in_order and alike else None), calls


@contextmanager
def _stubbed(source: SourceModel, stub: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    """The model's blocks do what `stub` returns for their names, for as long as the context lasts."""
    for name in source.blocks:
        source.module(name).forward = stub(name)
    try:
        yield
    finally:
        for name in source.blocks:
            del source.module(name).forward


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """A block's output for its input [batch, ctx, hidden]."""
    with OneHeadEach() if hidden.is_cuda else nullcontext():
        out = block(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def final_states(
    source: SourceModel, batches: Sequence[Tensor], hidden: Sequence[Sequence[Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """What the lm_head reads, given the last block's outputs in one or more models: [tokens, hidden] each, a batch."""
    last, output = source.module(source.blocks[-1]), source.block_output
    with (
        source.outside_blocks(device, torch.float32, batches) as model,
        _stubbed(source, lambda name: lambda x, *_, **__: output(x)),
    ):
        for tokens, outputs in zip(batches, zip(*hidden, strict=True), strict=True):
            states = []
            for state in outputs:
                last_state = state.to(device)
                last.forward = lambda *_, x=last_state, **__: output(x)
                out = model.base_model(input_ids=tokens.to(device), use_cache=False)
                states.append(out.last_hidden_state.flatten(0, 1))
            yield tuple(states)


@torch.no_grad()
def find_groups(block: nn.Module, hidden: Tensor, call: Call) -> tuple[list[list[str]], dict[str, str]]:
    """The block's layers in the order in which they run, those that read the same tensor together.

    An experts' product is a group of its own. Layers that do not run exactly once in a pass are in no group, but in the
    second value, with the reason. GlqError for experts that compute something else than is known.
    """
    names: dict[nn.Module, str] = {module: name for name, module in quantizable(block)}
    groups: list[tuple[Tensor, list[str]]] = []
    runs = dict.fromkeys(names.values(), 0)
    tokens = hidden.shape[-3] * hidden.shape[-2]

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        name = names[module]
        runs[name] += 1
        if not isinstance(module, nn.Linear):
            groups.append((torch.empty(0), [name]))
            return
        if args[0].numel() // args[0].shape[-1] % tokens:
            raise GlqError(f"{name} reads only some of the tokens: experts in a form that glq does not know yet")
        if groups and groups[-1][0] is args[0]:
            groups[-1][1].append(name)
        else:
            groups.append((args[0], [name]))

    def check(module: DenseExperts, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not module.agrees(args, y):
            kind = type(module.rest).__name__
            raise GlqError(f"experts of type {kind} are more than two products and an activation: not supported yet")

    hooks = [module.register_forward_pre_hook(note) for module in names]
    hooks += [m.register_forward_hook(check) for m in block.modules() if isinstance(m, DenseExperts)]
    try:
        block(hidden, *call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    left = {n: "runs more than once in a pass" if count else "is not run as a module" for n, count in runs.items()}
    left = {name: reason for name, reason in left.items() if runs[name] != 1}
    once = [[name for name in members if runs[name] == 1] for _, members in groups]
    return [members for members in once if members], left


@torch.no_grad()
def look_ahead(source: SourceModel, hidden: Tensor, calls: Sequence[Call], device: torch.device) -> dict[str, str]:
    """Run one block of each kind, before any work is done: the layers, by name, that stay as they are, with the reason.

    hidden: the first block's input, one batch. GlqError for a block that glq cannot quantize.
    """
    kinds: dict[tuple[Any, ...], dict[str, str]] = {}  # by what a block is made of
    left: dict[str, str] = {}
    own = copied(calls)
    for i, name in enumerate(source.blocks):
        made_of = _made_of(source.module(name))
        if made_of not in kinds:
            kinds[made_of] = _look_at(source, i, hidden, own, device)
        left |= {f"{name}.{member}": reason for member, reason in kinds[made_of].items()}
    if all(f"{b}.{n}" in left for b in source.blocks for n, _ in quantizable(source.module(b))):
        kind = source.config.model_type
        raise GlqError(f"no linear layer of a {kind!r} model can be quantized: they run several times, or never")
    return left


def _made_of(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that have the same modules with the same parameters."""
    modules = ((name, type(m).__name__) for name, m in block.named_modules())
    return (*modules, *((name, p.shape) for name, p in block.named_parameters()))


def _look_at(
    source: SourceModel, i: int, hidden: Tensor, calls: Sequence[Call], device: torch.device
) -> dict[str, str]:
    """What is left in one block, run by itself, or, if it needs what earlier ones leave behind, after these."""
    name = source.blocks[i]
    try:
        try:
            return _left_in(source, i, hidden, calls[i], device)
        except (KeyError, TypeError):
            x = hidden
            for k in range(i):
                x = run_block(source.load(source.blocks[k], device, torch.float32), x, calls[k])
                source.unload(source.blocks[k])
            return _left_in(source, i, x, calls[i], device)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, GlqError):
            raise
        kind = type(source.module(name)).__name__
        raise GlqError(f"{name}: a {kind} cannot be run on its own: {_first_line(error)}") from error


def _left_in(source: SourceModel, i: int, hidden: Tensor, call: Call, device: torch.device) -> dict[str, str]:
    block = source.load(source.blocks[i], device, torch.float32)
    try:
        return find_groups(block, hidden, call)[1]
    finally:
        source.unload(source.blocks[i])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
