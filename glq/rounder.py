"""Groups of layers that read the same input: rounded as one matrix, written as they come, accounted for."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glq import findings
from glq.calibration import Group
from glq.codecs import Codec, get_codec
from glq.codecs.packing import tile_rows
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.moments import Moments
from glq.packed import PackedLinear, pack_codes, pack_signs
from glq.rotation import block_width, random_signs, rotate, unrotate
from glq.rounding import (
    PanelRounder,
    Rounded,
    all_finite,
    damped_factor,
    energy,
    feedback,
    round_matrix,
    round_panel,
    solve,
)
from glq.writer import CheckpointWriter

HALF_STEP = 0.5  # of the way from the weights to those that fit the reference's outputs best
_AT_ONCE = 2**22  # elements of moments that are rotated at once
_STEP = 64  # rows that are whole tiles of every codec
_PIECE = 2**26  # weights of one layer that are rounded at once, about
_FULL = 8192  # rows of which every column keeps all of a GPU busy, about


@dataclass(frozen=True)
class Stored:
    """A layer that was rounded: its entry in the config, its bytes, the share of its outputs' energy that was lost.

    Of experts, all those that were rounded so far; `lost` is the mean.
    """

    module: ModuleConfig
    nbytes: int
    lost: float

    def joined(self, other: "Stored") -> "Stored":
        """With the next expert."""
        count = self.module.experts or 0
        module = replace(self.module, experts=count + 1)
        return Stored(module, self.nbytes + other.nbytes, (count * self.lost + other.lost) / (count + 1))


@dataclass(frozen=True)
class Choice:
    """How a group is to be rounded: the codec of each layer.

    shards: into which tensor-parallel ranks cut the input, and which no block of the rotation may cross.
    """

    group: Group
    codecs: dict[str, str]
    shards: int = 1


@dataclass(frozen=True)
class Matrix:
    """Layers that are rounded as one matrix, and all that the outcome depends on: data that can go to another place."""

    layers: list[nn.Linear]
    moments: Moments
    codec: str
    seed: int
    damping: float
    shards: int
    alone: bool  # nothing else reads the moments: they may be overwritten

    @property
    def size(self) -> float:
        """Of the time it takes: columns come one after the other, and few rows leave a GPU idle."""
        return self.moments.hessian.shape[0] * max(_FULL, sum(layer.out_features for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Of weights and moments."""
        return self.moments.nbytes + sum(layer.weight.nbytes for layer in self.layers)

    def to(self, device: torch.device) -> "Matrix":
        layers = [linear(layer.weight.to(device)) for layer in self.layers]
        return replace(self, layers=layers, moments=self.moments.to(device))

    def round(self, panels: PanelRounder) -> "Outcome":
        found, how = findings.of_input(self.moments), (get_codec(self.codec), self.seed, self.damping)
        packed, lost = round_in_pieces(self.layers, self.moments, *how, panels, self.shards, self.alone, found)
        return Outcome(packed, lost, found)


@dataclass(frozen=True)
class Outcome:
    """Of rounding a matrix: its layers packed, the share of energy that was lost, and what is worth knowing."""

    packed: list[PackedLinear]
    lost: float
    found: list[str]

    def to(self, device: torch.device) -> "Outcome":
        return replace(self, packed=[p.to(device) for p in self.packed])


class Workers(Protocol):
    """Who rounds matrices: `count` at once, which changes nothing but the time. Outcomes come in the order given.

    device: where the matrices are, and the outcomes.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def count(self) -> int: ...

    def __call__(self, matrices: Sequence[Matrix]) -> list[Outcome]: ...


class GroupRounder:
    """Rounds groups of layers; `stored` says what was done, by the layers' full names.

    tokens: how many of the calibration each expert read, by the name of its layer's first product.
    """

    def __init__(self, writer: CheckpointWriter, workers: Workers, seed: int, damping: float) -> None:
        self.stored: dict[str, Stored] = {}
        self.tokens: dict[str, list[int]] = {}
        self.findings: dict[str, list[str]] = {}
        self.writer, self.workers, self._seed, self._damping = writer, workers, seed, damping

    def __call__(self, *choices: Choice) -> None:
        """Round the layers of groups, give them the rounded weights, and write them to the checkpoint, in this order.

        Experts of one layer share their signs, so that an input is rotated once for all of them.
        """
        chosen = [part for choice in choices for part in self._parts(choice)]
        outcomes = self.workers([part.matrix for part in chosen])
        for part, outcome in zip(chosen, outcomes, strict=True):
            self._keep(part, outcome)
            self.note(", ".join(part.layers), outcome.found, part.expert)

    def note(self, name: str, found: list[str], expert: int | None = None) -> None:
        """Have findings in the record, under a name."""
        if found:
            own = name if expert is None else name.replace("*", str(expert))
            self.findings.setdefault(own, []).extend(found)

    def to_dict(self) -> dict[str, Any]:
        """What was done, as JSON."""
        stored = {name: [s.module.to_dict(), s.nbytes, s.lost] for name, s in self.stored.items()}
        return {"stored": stored, "tokens": self.tokens, "findings": self.findings}

    def restore(self, done: dict[str, Any]) -> None:
        """Go on after what another one did, in the form of `to_dict`."""
        self.tokens, self.findings = done["tokens"], done["findings"]
        self.stored = {n: Stored(ModuleConfig(**module), *rest) for n, (module, *rest) in done["stored"].items()}

    def _parts(self, choice: Choice) -> Iterator["_Part"]:
        """The layers of a group that one codec takes, as one matrix."""
        group, codecs = choice.group, choice.codecs
        first = next(iter(group.layers))
        if not all_finite(group.moments.hessian):
            raise GlqError(f"{first} reads NaN or infinite values on the calibration text: the model is broken")
        if group.expert is not None:
            self.tokens.setdefault(first, []).append(group.tokens)
        different = dict.fromkeys(codecs.values())
        for codec in different:
            layers = {name: layer for name, layer in group.layers.items() if codecs[name] == codec}
            alone = len(different) == 1 and group.expert is None
            how = (codec, group_seed(self._seed, first), self._damping, choice.shards, alone)
            yield _Part(layers, Matrix(list(layers.values()), group.moments, *how), group.expert)

    def _keep(self, part: "_Part", outcome: Outcome) -> None:
        expert, lost = part.expert, outcome.lost
        for (name, layer), p in zip(part.layers.items(), outcome.packed, strict=True):
            if not torch.isfinite(p.scale).all():
                raise GlqError(f"{name}: its weights are too large for 16-bit scales: the model is broken")
            layer.weight.data = p.dequantize()
            own = name if expert is None else name.replace("*", str(expert))
            self.writer.add({f"{own}.codes": p.codes, f"{own}.scale": p.scale, f"{own}.signs": p.signs})
            done = Stored(ModuleConfig(p.codec, p.in_features, p.out_features, p.block), p.nbytes, lost)
            if expert is not None:
                done = self.stored.get(name, replace(done, nbytes=0)).joined(done)
            self.stored[name] = done


@dataclass(frozen=True)
class _Part:
    """Layers of a group by their names, and the matrix as which they are rounded."""

    layers: dict[str, nn.Linear]
    matrix: Matrix
    expert: int | None


def linear(weight: Tensor) -> nn.Linear:
    """A layer of this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def round_in_pieces(
    layers: list[nn.Linear],
    moments: Moments,
    codec: Codec,
    seed: int,
    damping: float,
    panels: PanelRounder,
    shards: int,
    overwrite: bool,
    found: list[str],
) -> tuple[list[PackedLinear], float]:
    """As round_layers; a layer of very many rows, such as an lm_head, some rows at a time, which takes less memory."""
    how = (codec, seed, damping, panels, shards)
    weight = layers[0].weight
    if len(layers) > 1 or weight.numel() <= _PIECE:
        return round_layers(layers, moments, *how, overwrite, found)
    rows = max(_STEP, _PIECE // weight.shape[1] // _STEP * _STEP)
    done: list[PackedLinear] = []
    lost = whole = 0.0
    for some in weight.split(rows):
        said = list[str]()
        (packed,), share = round_layers([linear(some)], moments, *how, found=said)
        size = energy(some.float(), moments.hessian).item()
        done, lost, whole = [*done, packed], lost + share * size, whole + size
        found += [finding for finding in said if finding not in found]
    codes, scale = torch.cat([p.codes for p in done]), torch.cat([p.scale for p in done])
    joined = replace(done[0], out_features=len(weight), codes=codes, scale=scale)
    return [joined], lost / whole if whole > 0 else lost


def round_layers(
    layers: list[nn.Linear],
    moments: Moments,
    codec: Codec,
    seed: int,
    damping: float,
    panels: PanelRounder = round_panel,
    shards: int = 1,
    overwrite: bool = False,
    found: list[str] | None = None,
) -> tuple[list[PackedLinear], float]:
    """Round linear layers that read the same input, as one matrix: them packed, and the share of energy lost.

    overwrite: the moments may be, which saves the memory of two matrices. found: gets what is worth knowing.
    """
    found = [] if found is None else found
    height = tile_rows(codec.group)
    weight = torch.cat([pad(layer.weight.float(), (0, 0, 0, -layer.out_features % height)) for layer in layers])
    p = _pose(weight, moments, seed, damping, shards, overwrite)
    del weight
    found += findings.of_damping(damping, p.damping)
    whole = energy(p.target, p.hessian)
    rounded, scale, lost = _rounded(p, p.feedback, codec, panels, whole)
    plain = findings.expected_loss(p.target, p.hessian, codec.mse) / whole.item() if whole > 0 else lost
    if lost > findings.WORSE * plain:
        without = _rounded(p, torch.eye(len(p.hessian), device=whole.device), codec, panels, whole)
        found.append(
            f"loses {lost:.3g} where plain rounding is expected to lose {plain:.3g}, and does {without[2]:.3g}"
        )
        if without[2] < lost:
            rounded, scale, lost = without
    packed, tile = [], 0
    for layer in layers:
        tiles = -(-layer.out_features // height)
        codes = pack_codes(rounded.codes[tile : tile + tiles], codec.name)
        rows = slice(tile * height, tile * height + layer.out_features)
        shape = (layer.out_features, layer.in_features)
        packed.append(PackedLinear(codec.name, *shape, p.block, codes, scale[rows].clone(), pack_signs(p.signs)))
        tile += tiles
    return packed, lost


def _rounded(
    p: "_Problem", n: Tensor, codec: Codec, panels: PanelRounder, whole: Tensor
) -> tuple[Rounded, Tensor, float]:
    """With the fp16 scales that are stored, and the share of the whole energy that is lost with these."""
    rounded = round_matrix(p.target, p.hessian, n, codec, panels)
    scale = rounded.scale.to(torch.float16)
    return rounded, scale, (energy(p.target - rounded.values * scale.float()[:, None], p.hessian) / whole).item()


def correct_layers(layers: list[nn.Linear], moments: Moments, seed: int, damping: float, mse: float) -> None:
    """Move layers that read the same input as round_layers would, without rounding them.

    mse: give them errors like those of a codec of this distortion on N(0, 1). Rounding makes a white error in each step
    of LDLQ; after the feedback, what is left is that error times the inverse of the feedback's matrix.
    """
    p = _pose(torch.cat([layer.weight.float() for layer in layers]), moments, seed, damping)
    changed = p.target
    if mse > 0:
        white = torch.randn(changed.shape, generator=torch.Generator().manual_seed(seed)).to(changed.device)
        white *= (mse * changed.square().mean(1, keepdim=True)).sqrt()
        changed = changed - torch.linalg.solve_triangular(p.feedback, white, upper=True, left=False, unitriangular=True)
    weight = unrotate(changed, p.signs, p.block)
    for layer, part in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part


@dataclass(frozen=True)
class _Problem:
    """What is to be rounded, in the rotated basis: target [out, in], hessian [in, in], the feedback of its factor."""

    target: Tensor
    hessian: Tensor
    feedback: Tensor
    signs: Tensor
    block: int
    damping: float  # that the factor took


def _pose(
    weight: Tensor, moments: Moments, seed: int, damping: float, shards: int = 1, overwrite: bool = False
) -> _Problem:
    """Rotate, and move the weights [out, in] towards those that fit the reference's outputs best."""
    block = block_width(weight.shape[1], shards)
    signs = random_signs(weight.shape[1], torch.Generator().manual_seed(seed)).to(weight.device)
    both = (moments.hessian, moments.drift)
    h, drift = (_rotate_both(moment if overwrite else moment.clone(), signs, block) for moment in both)
    target = rotate(weight, signs, block)
    m, taken = damped_factor(h, damping)
    for rows in target.tensor_split(-(-len(target) // _rows(target))):
        rows += HALF_STEP * solve(m, rows @ drift)
    return _Problem(target, h, feedback(m), signs, block, taken)


def group_seed(seed: int, name: str) -> int:
    """A seed for each group of layers, independent of the order in which they come."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") % 2**63


def _rows(x: Tensor) -> int:
    """Rows of a matrix to treat at once: on a CPU few, for little memory."""
    return max(64, _AT_ONCE // x.shape[1]) if x.device.type == "cpu" else len(x)


def _rotate_both(h: Tensor, signs: Tensor, block: int) -> Tensor:
    """R·h·Rᵀ, in the memory of h [in, in]; done in pieces, it is the same to the bit."""
    step = _rows(h)
    for some in range(0, len(h), step):
        rows = h[some : some + step]
        rows.copy_(rotate(rows, signs, block))
    for some in range(0, len(h), step):
        columns = h[:, some : some + step]
        columns.copy_(rotate(columns.T, signs, block).T)
    return h
