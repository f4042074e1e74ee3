"""Mixed precision: which layers get how many bits, so that a given size loses least.

A group's measured sensitivity times the distortion of a codec is what that codec costs there, and a dynamic program
over the bytes of every choice finds the exact optimum of the sum.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glq.codecs import CODECS, DEFAULT_CODECS, get_codec
from glq.errors import GlqError
from glq.packed import packed_shapes
from glq.pipeline import Settings, check_bits
from glq.progress import Listener, silent
from glq.sensitivity import Group, measure

_MAX_STEPS = 200_000  # of the dynamic program's budget; beyond, bytes are counted in coarser units


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

    def to_dict(self) -> dict[str, Any]:
        groups = [asdict(group) | {"codec": codec} for group, codec in zip(self.groups, self.codecs, strict=True)]
        return {"bits": self.bits, "groups": groups}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

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
    """Measure every group's sensitivity, as sensitivity.measure does, and allocate `bits` (1.5 to 4) a weight."""
    check_bits(bits)
    groups = measure(model, settings, calibration=calibration, device=device, progress=progress)
    return allocate(groups, bits)


def allocate(groups: Sequence[Group], bits: float) -> Plan:
    """The codecs that minimize Σ sensitivity · MSE within `bits` a weight of codes: exact, by dynamic programming."""
    check_bits(bits)
    names = list(DEFAULT_CODECS.values())
    costs = [[_code_bytes(g, name) for name in names] for g in groups]
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


def _code_bytes(group: Group, codec: str) -> int:
    """Bytes of a group's codes; scales and signs are the same for every codec."""
    return sum(math.prod(packed_shapes(codec, rows, cols)["codes"]) for rows, cols in group.shapes)
