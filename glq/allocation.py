"""Mixed precision: which layers get how many bits, so that a given size loses least.

The unit is a group, the layers that read one input (q/k/v, gate/up, …): serving fuses them, so they share a codec.
A group's sensitivity is measured, not modelled: the KL divergence that rounding this group alone costs. Distortion
scales that to other codecs, and a dynamic program over the bytes of every choice finds the exact optimum of the sum.
"""

import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glq.calibration import read_text, windows
from glq.codecs import CODECS, DEFAULT_CODECS, get_codec
from glq.errors import GlqError
from glq.evaluation import last_states, mean_divergence
from glq.hf_integration import load
from glq.hub import load_tokenizer, resolve
from glq.machine import pick_device
from glq.packed import packed_shapes
from glq.pipeline import Settings, check_bits, round_model
from glq.progress import Listener, Progress, silent

_QUICK = {1.5: "e8-1.5", 2: "e8-2", 3: "nested-3", 4: "nested-4"}  # codecs for a first pass: near enough, and fast
_WINDOWS = {"cpu": 2, "cuda": 8}  # of calibration text, to measure KL on
_MAX_STEPS = 200_000  # of the dynamic program's budget; beyond, bytes are counted in coarser units


@dataclass(frozen=True)
class Group:
    """Layers that share a codec. shapes: (out, in) of each; sensitivity: KL in nats a token for each unit of MSE."""

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    sensitivity: float

    @property
    def weights(self) -> int:
        return sum(rows * cols for rows, cols in self.shapes)

    def code_bytes(self, codec: str) -> int:
        """Bytes of codes; scales and signs are the same for every codec."""
        return sum(math.prod(packed_shapes(codec, rows, cols)["codes"]) for rows, cols in self.shapes)


@dataclass(frozen=True)
class Plan:
    """A codec for every group. JSON that may be edited: Settings take the `layers` and `codec` of each group."""

    bits: float  # asked for, a weight, scales and signs on top as for the uniform rates
    groups: tuple[Group, ...]
    codecs: tuple[str, ...]

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """As Settings.layers takes them."""
        return tuple((name, codec) for g, codec in zip(self.groups, self.codecs, strict=True) for name in g.layers)

    def write(self, path: Path) -> None:
        groups = [asdict(group) | {"codec": codec} for group, codec in zip(self.groups, self.codecs, strict=True)]
        path.write_text(json.dumps({"bits": self.bits, "groups": groups}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """GlqError for what is not a plan, by what is wrong with it."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            groups = [
                Group(
                    tuple(map(str, g["layers"])),
                    tuple((int(rows), int(cols)) for rows, cols in g["shapes"]),
                    float(g["sensitivity"]),
                )
                for g in raw["groups"]
            ]
            codecs = tuple(get_codec(g["codec"]).name for g in raw["groups"])
            return cls(float(raw["bits"]), tuple(groups), codecs)
        except GlqError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GlqError(f"{path} is not a plan of `glq plan`: {error!r}") from error


def make_plan(
    model: str | Path,
    bits: float,
    settings: Settings,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    progress: Listener = silent,
) -> Plan:
    """Measure every group's sensitivity and allocate `bits` (1.5 to 4) a weight among them."""
    check_bits(bits)
    return allocate(measure(model, bits, settings, calibration=calibration, device=device, progress=progress), bits)


def measure(
    model: str | Path,
    bits: float,
    settings: Settings,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    progress: Listener = silent,
) -> list[Group]:
    """The groups of a model and their sensitivities around a uniform rate near `bits`."""
    where = pick_device(device)
    codec = _QUICK[min(_QUICK, key=lambda rate: abs(rate - bits))]
    quick = replace(settings, bits=get_codec(codec).bits, codec=codec, layers=(), embeddings=None, head=None)
    with tempfile.TemporaryDirectory(prefix="glq-plan-") as folder:
        out = Path(folder) / "rounded"
        result = round_model(
            model, out, quick, calibration=calibration, device=device, isolated=True, progress=progress
        )
        rounded = load(out, device=where, dtype=torch.float32)
        if where.type != "cpu":
            rounded = rounded.dequantize(torch.float32)
    original = load(model, device=where, dtype=torch.float32)
    count = _WINDOWS.get(where.type, 2)
    text = read_text(calibration)
    ids = windows(load_tokenizer(resolve(model)), text, count, settings.ctx, spread=True).to(where)
    return _sensitivities(original, rounded, result.groups, ids, CODECS[codec].mse, progress)


@torch.inference_mode()
def _sensitivities(
    model: PreTrainedModel,
    rounded: PreTrainedModel,
    groups: tuple[tuple[str, ...], ...],
    ids: Tensor,
    mse: float,
    progress: Listener,
) -> list[Group]:
    states = last_states(model, ids)
    found = []
    for i, names in enumerate(groups):
        layers = [_linear(model, name) for name in names]
        kept = [layer.weight for layer in layers]
        for layer, name in zip(layers, names, strict=True):
            layer.weight = _linear(rounded, name).weight
        cost = mean_divergence(model, model, states, ids)
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight
        shapes = tuple((layer.out_features, layer.in_features) for layer in layers)
        found.append(Group(names, shapes, cost / mse))
        progress(Progress("measuring", i + 1, len(groups), f"{names[0]}  KL {cost:.4f}"))
    return found


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def allocate(groups: list[Group], bits: float) -> Plan:
    """The codecs that minimize Σ sensitivity · MSE within `bits` a weight of codes: exact, by dynamic programming."""
    check_bits(bits)
    names = list(DEFAULT_CODECS.values())
    costs = [[g.code_bytes(name) for name in names] for g in groups]
    losses = [[g.sensitivity * CODECS[name].mse for name in names] for g in groups]
    least = [min(row) for row in costs]
    unit = math.gcd(*(cost - low for row, low in zip(costs, least, strict=True) for cost in row))
    budget = int(bits * sum(g.weights for g in groups) / 8) - sum(least)
    if budget < 0:  # padding alone takes more: nothing to choose
        return Plan(bits, tuple(groups), tuple(names[row.index(min(row))] for row in costs))
    unit = max(1, unit) * max(1, math.ceil(budget / max(1, unit) / _MAX_STEPS))
    size = budget // unit + 1
    best = torch.zeros(size, dtype=torch.float64)
    choices = []
    for row, low, loss in zip(costs, least, losses, strict=True):
        options = torch.full((len(names), size), math.inf, dtype=torch.float64)
        for i, cost in enumerate(row):
            step = -(-(cost - low) // unit)
            if step < size:
                options[i, step:] = best[: size - step] + loss[i]
        best, choice = options.min(0)
        choices.append(choice)
    at, codecs = size - 1, []
    for row, low, choice in zip(reversed(costs), reversed(least), reversed(choices), strict=True):
        picked = int(choice[at])
        codecs.append(names[picked])
        at -= -(-(row[picked] - low) // unit)
    return Plan(bits, tuple(groups), tuple(reversed(codecs)))
