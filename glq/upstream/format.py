"""Which matrices of an upstream checkpoint are quantized, and how: from config.json and the tensors' headers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glq.errors import GlqError
from glq.upstream.packing import E8P_COLUMNS, E8P_ROWS
from glq.upstream.trellis import TILE

SHELL, RELAXED, E8P, TRELLIS = "e8_shell", "e8_relaxed", "e8p", "trellis"
E81B = "e81b"
_FIRST = {"Qidxs": SHELL, "Qidxs_e8p": E8P, "trellis_packed": TRELLIS}  # tensors that make a module a quantized one
_WEIGHTS = {2: "inv_resid_scale", 3: "inv_resid_scale2", 4: "inv_resid_scale3"}  # of later stages
_TRELLIS_WEIGHT = "inv_resid_scale2"  # of its second stage
_FLOATS = ("F16", "BF16", "F32")

Header = tuple[str, tuple[int, ...], int]  # of a tensor: dtype as safetensors names it, shape, bytes


@dataclass(frozen=True)
class UpstreamConfig:
    """What upstream's quantization_config says that a reader needs; raw is all of it."""

    codebook: str
    variant: str  # of a trellis: "3inst" or "hyb"
    raw: Mapping[str, Any]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UpstreamConfig":
        """GlqError for a codebook, variant or layout that is not known."""
        codebook, variant = raw.get("codebook"), raw.get("variant", "hyb")
        layout = raw.get("trellis_layout")
        if codebook not in (SHELL, RELAXED, E8P, TRELLIS):
            raise GlqError(
                f"quantization_config: upstream glq's codebook {codebook!r} is not known, only {SHELL}, {RELAXED}, "
                f"{E8P} and {TRELLIS} are: a newer version wrote it, or config.json is damaged"
            )
        if codebook == TRELLIS and variant not in ("hyb", "3inst"):
            raise GlqError(f"quantization_config: upstream glq's trellis variant {variant!r} is not known")
        if codebook == TRELLIS and layout != "kernel" and (variant == "3inst" or layout is not None):
            raise GlqError(
                f"quantization_config: trellis_layout is {layout!r}, of before upstream glq's release, and cannot be "
                "read: quantize the model again"
            )
        return cls(codebook, variant, raw)


@dataclass(frozen=True)
class Stage:
    """One of the summed parts of a matrix: the endings of the names of its tensors. The first has no weight."""

    codes: str
    kind: str  # SHELL, E8P, E81B or TRELLIS
    weight: str | None


@dataclass(frozen=True)
class Layout:
    """How a quantized matrix is stored. rows and columns are padded sizes, those of its two rotations."""

    name: str
    rows: int
    columns: int
    stages: tuple[Stage, ...]
    tensors: Mapping[str, Header]  # by the endings of their names
    embedding: bool = False  # a scale for each row, and no rotation of the rows


def find_layouts(headers: Mapping[str, Header], config: UpstreamConfig) -> dict[str, Layout]:
    """The quantized matrices among tensors, by name. GlqError for one that is not whole, or contradicts itself."""
    owned: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        module, _, ending = name.rpartition(".")
        owned.setdefault(module, {})[ending] = header
    found = {
        module: _layout(module, tensors, config)
        for module, tensors in owned.items()
        if any(ending in tensors for ending in _FIRST)
    }
    if not found:
        raise GlqError("the checkpoint has upstream glq's config, but no tensor with codes: it is incomplete")
    return found


def _layout(name: str, tensors: dict[str, Header], config: UpstreamConfig) -> Layout:
    firsts = [ending for ending in _FIRST if ending in tensors]
    for key in ("SU", "SV", "Wscale"):
        if key not in tensors:
            raise GlqError(f"{name} has {firsts[0]}, but no {key}: the checkpoint is incomplete, get it again")
    if len(firsts) > 1 or "weight" in tensors:
        other = "a plain weight" if len(firsts) == 1 else firsts[1]
        raise GlqError(f"{name} has {firsts[0]} and {other}: which one is meant is unknown")
    kind = _FIRST[firsts[0]]
    embedding = kind == SHELL and len(tensors["Wscale"][1]) == 1 and tensors["Wscale"][1] != (1,)
    expected = SHELL if config.codebook == RELAXED else config.codebook
    if kind != expected and not embedding:
        raise GlqError(f"{name} has {firsts[0]}, but config.json says codebook {config.codebook!r}: it is not its own")
    stages = _stages(name, firsts[0], kind, tensors)
    if kind == TRELLIS and (("tlut" in tensors) != (config.variant == "hyb")):
        raise GlqError(f"{name} has {'a' if 'tlut' in tensors else 'no'} tlut, yet the variant is {config.variant!r}")
    (columns,), codes = _shape(name, "SV", tensors, 1), tensors[firsts[0]][1]
    (rows,) = _shape(name, "SU", tensors, 1)
    if embedding:
        rows = tensors["Wscale"][1][0]
    layout = Layout(name, rows, columns, stages, tensors, embedding)
    _check(layout, codes)
    return layout


def _stages(name: str, first: str, kind: str, tensors: Mapping[str, Header]) -> tuple[Stage, ...]:
    """GlqError for a stage without its weight, or a weight without its stage."""
    if kind == TRELLIS:
        others = {2: [("trellis_packed2", TRELLIS)]}
        weights = {2: _TRELLIS_WEIGHT}
    elif kind == E8P:
        others = {s: [(f"Qidxs{s}_e8p", E8P), (f"Qidxs{s}_e81b", E81B)] for s in _WEIGHTS}
        weights = _WEIGHTS
    else:
        others = {s: [(f"Qidxs{s}", SHELL)] for s in _WEIGHTS}
        weights = _WEIGHTS
    stages = [Stage(first, kind, None)]
    for number, choices in others.items():
        present = [choice for choice in choices if choice[0] in tensors]
        weight = weights[number]
        if len(present) > 1:
            raise GlqError(f"{name} has {present[0][0]} and {present[1][0]}: which one is meant is unknown")
        if bool(present) != (weight in tensors):
            has, lacks = (present[0][0], weight) if present else (weight, choices[0][0])
            raise GlqError(f"{name} has {has}, but no {lacks}: the checkpoint is incomplete, get it again")
        if present and len(stages) != number - 1:
            raise GlqError(f"{name} has {present[0][0]}, but no stage {number - 1}: the checkpoint is incomplete")
        stages += [Stage(*present[0], weight) for _ in present]
    known = {stage.codes for stage in stages} | {stage.weight for stage in stages}
    codes = ("Qidxs", "trellis_packed", "inv_resid_scale")
    if extra := sorted(e for e in tensors if e.startswith(codes) and e not in known):
        raise GlqError(f"{name} has {extra[0]}, which is no part of a {kind} matrix: a newer version wrote it")
    return tuple(stages)


def _check(layout: Layout, codes: tuple[int, ...]) -> None:
    """GlqError for tensors of other types or shapes than those that belong to the sizes of a layout."""
    scalar: tuple[tuple[int, ...], ...] = ((layout.rows,),) if layout.embedding else ((), (1,))
    for stage in layout.stages:
        _check_codes(layout, stage, codes)
        if stage.weight is not None:
            _expect(layout, stage.weight, _FLOATS, scalar)
    _expect(layout, "Wscale", _FLOATS, scalar)
    _expect(layout, "SV", _FLOATS, ((layout.columns,),))
    if not layout.embedding:
        _expect(layout, "SU", _FLOATS, ((layout.rows,),))
    if "tlut" in layout.tensors:
        _expect(layout, "tlut", _FLOATS, ((512, 2),))


def _check_codes(layout: Layout, stage: Stage, first: tuple[int, ...]) -> None:
    rows, columns = layout.rows, layout.columns
    if stage.kind == SHELL:
        found = layout.tensors[stage.codes][1]
        if layout.embedding and len(found) == 2 and found[0] >= rows:
            rows = found[0]  # a few more than there are tokens
        _expect(layout, stage.codes, ("I16",), ((rows, math.ceil(columns / 8)),))
    elif stage.kind == E8P:
        tiles = (rows // E8P_ROWS, columns // E8P_COLUMNS, 8, 4)
        whole = rows % E8P_ROWS == 0 and columns % E8P_COLUMNS == 0
        _expect(layout, stage.codes, ("I64",), (tiles,) if whole else ())
    elif stage.kind == E81B:
        _expect(layout, stage.codes, ("I64",), ((rows, columns // E8P_COLUMNS),))
    else:
        k = layout.tensors[stage.codes][1][-1] // TILE if layout.tensors[stage.codes][1] else 0
        whole = rows % 32 == 0 and columns % 32 == 0 and 1 <= k <= 4
        _expect(layout, stage.codes, ("I16",), ((rows * columns // TILE**2, TILE * k),) if whole else ())


def _expect(layout: Layout, ending: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    dtype, shape, _ = layout.tensors[ending]
    if dtype not in dtypes or shape not in shapes:
        wanted = f"should be {dtypes[0]} {list(shapes[0])} beside" if shapes else "does not fit"
        raise GlqError(
            f"{layout.name}.{ending} {wanted} SU {list(layout.tensors['SU'][1])} and SV "
            f"{list(layout.tensors['SV'][1])}, found {dtype} {list(shape)}: the file is damaged, get it again"
        )


def _shape(name: str, ending: str, tensors: Mapping[str, Header], dims: int) -> tuple[int, ...]:
    shape = tensors[ending][1]
    if len(shape) != dims or 0 in shape:
        raise GlqError(f"{name}.{ending} should have {dims} dimension, found {list(shape)}: the file is damaged")
    return shape
