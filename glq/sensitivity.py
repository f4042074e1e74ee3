"""How much each group of layers matters: measured by what its rounding costs the whole model in the end.

A group is the layers that read one input (q/k/v, gate/up, …): serving fuses them, so they share a codec. One group
after the other gets errors like those of rounding; the layers behind it are moved to make up for them, as when all are
rounded one by one, but keep their precision; and the KL divergence of the outcome on tokens set aside is the group's
alone. What a codec costs there is that, scaled by its distortion: the KL of a rounded model is nearly the sum of its
groups', from 1.5 to 4 bits (docs/decisions.md).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from glq.calibration import Group as ReadByOne
from glq.calibration import microbatches, read_text, walk, windows
from glq.discovery import Call, capture, final_states, find_groups, look_ahead, run_block
from glq.evaluation import total_divergence
from glq.experts import ExpertLinear
from glq.hub import load_tokenizer
from glq.machine import pick_device
from glq.pipeline import Settings, open_model
from glq.progress import Listener, Progress, silent
from glq.rounder import correct_layers, group_seed

_TOKENS = {"cpu": (4096, 2048), "cuda": (65536, 8192)}  # to calibrate with, and to measure KL on
_AT_ONCE = {"cpu": 2, "cuda": 1}  # neighbouring blocks whose groups of one kind are measured together
_MSE = 0.06  # of the errors, on N(0, 1): as at 2.1 bits


@dataclass(frozen=True)
class Group:
    """Layers that share a codec. shapes: (out, in) of each matrix.

    sensitivity: KL in nats a token for each unit of MSE.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sensitivity: float

    @property
    def weights(self) -> int:
        return sum(rows * cols for rows, cols in self.shapes)


@torch.no_grad()
def measure(
    model: str | Path,
    settings: Settings,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    progress: Listener = silent,
) -> list[Group]:
    """The groups of a model in the order in which they run, with their sensitivities; good for every rate.

    Takes half a pass over the model for every group, on a CPU for every two. Of the settings, tokens, ctx, seed and
    damping count: take as many tokens as for rounding, since the layers behind make up for less with fewer.
    """
    bench = _Bench(model, read_text(calibration), settings, pick_device(device))
    blocks = len(bench.source.blocks)
    states, found = bench.reference, []
    step = _AT_ONCE.get(bench.device.type, 1)
    for start in range(0, blocks, step):
        end = min(start + step, blocks)
        groups, after = bench.look(states, start, end)
        costs = {}
        for kind in dict.fromkeys(map(_kind, groups)):
            together = [g for g in groups if _kind(g) == kind]
            costs[kind] = bench.cost(states, start, together) / sum(g.weights for g in together)
        for g in groups:
            found.append(Group(g.layers, g.shapes, costs[_kind(g)] * g.weights / _MSE))
            progress(Progress("measuring", end, blocks, f"{g.layers[0]}  {found[-1].sensitivity:.3f}"))
        states = after
    return found


def _kind(group: Group) -> str:
    """Its first layer's name without the number of the block."""
    return re.sub(r"\d+", "*", group.layers[0])


def _shapes(layer: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of a layer's matrices, those of all experts."""
    if isinstance(layer, ExpertLinear):
        count, rows, cols = layer.weight.shape
        return [(rows // len(layer.entries), cols)] * (count * len(layer.entries))
    weight = cast(nn.Linear, layer).weight
    return [(weight.shape[0], weight.shape[1])]


class _Bench:
    """The model, and tokens on their way into its first block."""

    def __init__(self, model: str | Path, text: str, settings: Settings, device: torch.device) -> None:
        self.source, self._settings = open_model(model, settings)
        self.device = device
        fit, check = _TOKENS.get(device.type, _TOKENS["cpu"])
        if settings.tokens is not None:
            fit, check = settings.tokens, min(check, settings.tokens // 2)
        fitted, checked = (max(1, n // settings.ctx) for n in (fit, check))
        ids = windows(load_tokenizer(self.source.path), text, fitted + checked, settings.ctx, spread=True)
        aside = torch.arange(len(ids)) * checked % len(ids) < checked  # as many as wanted, spread evenly
        set_aside = microbatches(ids[aside], device)
        self._batches, self._held_out = [*microbatches(ids[~aside], device), *set_aside], len(set_aside)
        self.reference, self._calls = capture(self.source, self._batches, device, torch.float32)
        self.source.left |= look_ahead(self.source, self.reference[0], self._calls[0], device)
        self.source.load(self.source.head, device, torch.float32)  # stays: every measurement ends there

    def look(self, states: list[Tensor], start: int, end: int) -> tuple[list[Group], list[Tensor]]:
        """The groups of blocks start … end − 1, still without sensitivity, and the states that leave them."""
        groups = []
        for i, name in enumerate(self.source.blocks[start:end], start):
            block = self.source.load(name, self.device, torch.float32)
            calls: list[Call] = [of_blocks[i] for of_blocks in self._calls]
            for members in find_groups(block, states[0], calls[0])[0]:
                layers = {f"{name}.{member}": block.get_submodule(member) for member in members}
                names = tuple(entry for full, layer in layers.items() for entry in self.source.entries(full, layer))
                groups.append(Group(names, tuple(s for layer in layers.values() for s in _shapes(layer)), 0.0))
            states = [run_block(block, x, call) for x, call in zip(states, calls, strict=True)]
            self.source.unload(name)
        return groups, states

    def cost(self, states: list[Tensor], start: int, groups: list[Group]) -> float:
        """KL in nats a token from errors in these groups of block `start` and after, whose inputs are `states`."""
        targets = {group.layers[0] for group in groups}
        reference, quantized, begun = list(states), list(states), False
        seed, damping = self._settings.seed, self._settings.damping

        def visit(one: list[ReadByOne]) -> None:
            nonlocal begun
            (group,) = one
            first = next(iter(group.layers))
            begun = begun or first in targets
            if begun:  # before, there is nothing to make up for
                mse = _MSE if first in targets else 0.0
                own = group_seed(seed, first if group.expert is None else f"{first} {group.expert}")
                correct_layers(list(group.layers.values()), group.moments, own, damping, mse)

        for _ in walk(self.source, reference, quantized, self._calls, self.device, visit, self._held_out, start):
            pass
        last, source = slice(-self._held_out, None), self.source
        pairs = final_states(source, self._batches[last], (reference[last], quantized[last]), self.device)
        total = sum(total_divergence(source.model, x, source.model, x_hat).item() for x, x_hat in pairs)
        return total / sum(batch.numel() for batch in self._batches[last])
