"""Calibration: text → tokens → for each decoder block, second moments of what its linear layers read.

Both models, the reference and the quantized prefix, run side by side: a block's forward stops where a group of linear
layers reads its input, in all microbatches, so that the group can be rounded and the pass can go on with the rounded
weights (passes.py).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from glq.discovery import Call, copied, find_groups
from glq.errors import GlqError
from glq.experts import ExpertLinear
from glq.machine import release_memory
from glq.moments import Moments, Routed, Sums, expert_moments
from glq.passes import Pass, begin
from glq.source import SourceModel
from glq.spill import Spill

_MICROBATCH = {"cpu": 1024, "cuda": 4096}  # tokens at once: for little memory, for few launches


def read_text(path: str | Path | None, default: str = "calibration") -> str:
    """The user's UTF-8 file, or a text that the package ships ("calibration" or "evaluation", public domain)."""
    if path is None:
        return files("glq").joinpath(f"data/{default}.txt").read_text(encoding="utf-8")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GlqError(f"cannot read the text {path}: {error}. Give a UTF-8 text file") from error


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None, ctx: int, *, spread: bool) -> Tensor:
    """[count, ctx] token ids of non-overlapping windows, each after what the tokenizer puts in front (BOS).

    spread takes the windows evenly from the whole text, otherwise they are its first ones; None takes all there are.
    GlqError if the text is too short.
    """
    prefix = tokenizer("")["input_ids"]
    body = ctx - len(prefix)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // body
    if not available:
        raise GlqError(
            f"the text is too short: it has {len(ids)} tokens, a window takes {body}. Give a longer text, or a shorter "
            "--ctx"
        )
    count = available if count is None else count
    if available < count:
        raise GlqError(
            f"the text is too short: {count} windows of {ctx} tokens need {count * body} tokens, it has {len(ids)}. "
            f"Give a longer text or ask for fewer tokens ({available * ctx} at most)"
        )
    starts = [i * available // count if spread else i for i in range(count)]
    return torch.tensor([prefix + ids[s * body : (s + 1) * body] for s in starts])


def microbatches(tokens: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """tokens [windows, ctx] in parts that go through a block at once."""
    return tokens.split(max(1, _MICROBATCH.get(device.type, _MICROBATCH["cpu"]) // tokens.shape[1]))


@dataclass(frozen=True)
class Read:
    """A group of a block by its members' names in it, and what it read: for experts, all that their layer did."""

    members: list[str]
    inputs: Moments | list[Routed]


@dataclass(frozen=True)
class Group:
    """Layers that read one input, by their names in files, and the moments of what they read.

    For experts, a group is what each of them has: names have a * for the number, `expert`, and `tokens` of the
    calibration came to it.
    """

    layers: dict[str, nn.Linear]
    moments: Moments
    expert: int | None = None
    tokens: int = 0


def calibrate_block(
    block: nn.Module,
    groups: list[list[str]],
    reference: list[Tensor],
    quantized: list[Tensor],
    calls: list[Call],
    calls_hat: list[Call],
    device: torch.device,
    round_groups: Callable[[nn.Module, list[Read]], None],
    held_out: int = 0,
    side_by_side: bool = False,
    spill: Spill | None = None,
    free: Callable[[Tensor], None] = lambda _: None,
) -> Iterator[int]:
    """Take both models, called as calls and calls_hat say, through one block and round its groups on the way.

    reference and quantized hold a [batch, ctx, hidden] tensor a microbatch, there or in the host's memory, and are
    overwritten with the block's outputs. round_groups gets the copy of the block that belongs to the quantized model,
    whose weights it replaces, and what the groups read that can be rounded now: one after the other, each after those
    before it, or, side_by_side, all of the block, which costs one pass more. The last `held_out` microbatches go along,
    but moments do not count them. Yields the number of the group just rounded, then of the end. spill: where what is
    not worked on waits. free: gets a state before it is overwritten.
    """
    spill = spill or Spill(None)
    spill.put_module(block)
    twin = copy.deepcopy(block)
    read: list[Read] = []
    leaders = [[model.get_submodule(members[0]) for members in groups] for model in (block, twin)]
    pairs = [
        (
            begin(block, leaders[0], hidden, call, device, changes=False),
            begin(twin, leaders[1], hidden_hat, call_hat, device),
        )
        for hidden, hidden_hat, call, call_hat in zip(reference, quantized, calls, calls_hat, strict=True)
    ]
    for i, members in enumerate(groups):
        leader, sums, routed = leaders[1][i], Sums(), list[Routed]()
        for k, (run, run_hat) in enumerate(pairs):
            _request(chain.from_iterable(pairs[k + 1 : k + 2]))
            (x, *experts), (x_hat, *experts_hat) = run.advance(), run_hat.advance()
            if k < len(pairs) - held_out and isinstance(leader, ExpertLinear):
                routed.append(Routed(x, experts[0], x_hat, experts_hat[0], leader.of_pairs))
                spill.put([x, x_hat])
            elif k < len(pairs) - held_out:
                sums.add(x, x_hat)
            if i == len(groups) - 1:  # the reference waits for no one: its memory is needed
                _replace(reference, k, run.finish(), spill, free)
                if side_by_side:
                    run_hat.again()
            for paused in (run, run_hat):
                spill.put(paused.held())
        for model in (block, twin):
            spill.put_module(model)
        del x, x_hat
        read.append(Read(members, routed or sums.mean()))
        if not side_by_side:
            round_groups(twin, read)
            read = []
            spill.put_module(twin)
            yield i
    if side_by_side:
        round_groups(twin, read)
        yield from range(len(groups))
    for k, (run, run_hat) in enumerate(pairs):
        _request(one for both in pairs[k + 1 : k + 2] for one in (both[1:] if groups else both))
        if not groups:
            _replace(reference, k, run.finish(), spill, free)
        _replace(quantized, k, run_hat.finish(), spill, free)
    yield len(groups)


def _request(passes: Iterable[Pass]) -> None:
    for one in passes:
        one.request()


def _replace(states: list[Tensor], k: int, state: Tensor, spill: Spill, free: Callable[[Tensor], None]) -> None:
    """Have a microbatch's new state where the old one is: on the disk, on the device, or in the host's memory."""
    free(states[k])
    if states[k].device == state.device:
        states[k] = state
        spill.put([state])
    else:
        states[k].copy_(state)


def groups_of(
    prefix: str, source: SourceModel, block: nn.Module, read: list[Read], together: int
) -> Iterator[list[Group]]:
    """The layers of a block that were read, to be changed while they are yielded: those together that may be.

    Of experts, whose moments take memory, `together` at once.
    """
    if plain := [r for r in read if isinstance(r.inputs, Moments)]:
        yield [_plain_group(prefix, source, block, r.members, cast(Moments, r.inputs)) for r in plain]
    for r in read:
        if not isinstance(r.inputs, Moments):
            (product,) = (cast(ExpertLinear, block.get_submodule(member)) for member in r.members)
            moments = enumerate(expert_moments(r.inputs, len(product.weight)))
            while some := list(islice(moments, together)):
                groups = [Group(product.linears(expert), m, expert, tokens) for expert, (tokens, m) in some]
                yield groups
                for group in groups:
                    product.replace(cast(int, group.expert), group.layers)


def _plain_group(prefix: str, source: SourceModel, block: nn.Module, members: list[str], moments: Moments) -> Group:
    modules = {member: block.get_submodule(member) for member in members}
    names = {source.entries(f"{prefix}.{member}", module)[0]: module for member, module in modules.items()}
    return Group(cast(dict[str, nn.Linear], names), moments)


def walk(
    source: SourceModel,
    reference: list[Tensor],
    quantized: list[Tensor],
    calls: list[list[Call]],
    device: torch.device,
    visit: Callable[[list[Group]], None],
    held_out: int = 0,
    first: int = 0,
    together: int = 1,
    side_by_side: bool = False,
    spill: Spill | None = None,
    free: Callable[[Tensor], None] = lambda _: None,
    ended: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Take both models through all blocks; `visit` gets the groups, and may change their layers' weights.

    It gets those that do not wait for each other at once: experts, `together` of them, and side_by_side all of a block.

    reference, quantized and calls as `capture` returns them, the states as they enter block `first`; they become the
    last block's outputs. Yields, after each group, or all experts': the names of its layers, how many groups are done,
    and how many there are. spill, free: as calibrate_block takes them. ended: gets the number of a block behind.
    """
    release_memory()
    calls_hat = [copied(of_blocks) for of_blocks in calls]
    for i, name in enumerate(source.blocks[first:], first):
        block = source.load(name, device, torch.float32)
        if i + 1 < len(source.blocks):
            source.expect(source.blocks[i + 1])
        block_calls, block_calls_hat = ([of_blocks[i] for of_blocks in all_calls] for all_calls in (calls, calls_hat))
        groups, _ = find_groups(block, reference[0].to(device), block_calls[0])  # all of it: masks have its batch size

        def visit_all(twin: nn.Module, read: list[Read], prefix: str = name) -> None:
            for some in groups_of(prefix, source, twin, read, together):
                visit(some)

        models = (reference, quantized, block_calls, block_calls_hat)
        steps = calibrate_block(block, groups, *models, device, visit_all, held_out, side_by_side, spill, free)
        for done in steps:
            if done < len(groups):
                modules = ((f"{name}.{member}", block.get_submodule(member)) for member in groups[done])
                names = tuple(entry for full, module in modules for entry in source.entries(full, module))
                yield names, i * len(groups) + done + 1, len(source.blocks) * len(groups)
        source.unload(name)
        release_memory()
        ended(i)
