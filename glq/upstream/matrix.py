"""One matrix of an upstream checkpoint: its tensors, and what they mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from glq.errors import GlqError
from glq.upstream import codebooks, trellis
from glq.upstream.codebooks import Table
from glq.upstream.format import E8P, E81B, RELAXED, SHELL, TRELLIS, Layout, UpstreamConfig
from glq.upstream.packing import e8p_codes, e81b_codes, shell_codes
from glq.upstream.transform import fast_transform, transform

_ROWS = 65536  # of an embedding that are decoded at once

_GROUPED: dict[str, Callable[[Tensor], Tensor]] = {SHELL: shell_codes, E8P: e8p_codes, E81B: e81b_codes}


@dataclass(frozen=True)
class Part:
    """A stage: the kind of its codes, these, the table, and the weight of what is decoded; None for 1."""

    kind: str  # SHELL, E8P, E81B, "3inst" or "hyb"
    codes: Tensor
    table: Tensor  # [codes, values] fp16; of hyb, the layer's tlut
    weight: Tensor | None  # [] fp32

    def decode(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] fp32."""
        if self.kind in _GROUPED:
            index = _GROUPED[self.kind](self.codes)
            values = self.table.index_select(0, index.flatten()).view(len(index), -1)[:, :columns]
        else:
            index = trellis.states(self.codes, rows, columns, trellis.VALUES[self.kind])
            table = trellis.hybrid_table(self.table) if self.kind == "hyb" else self.table
            steps = table.index_select(0, index.flatten()).view(*index.shape, -1)
            values = trellis.untiled(steps, rows, columns)
        return values.float() if self.weight is None else values.float() * self.weight.float()


@dataclass(frozen=True)
class Matrix:
    """W = (diag(SU) · B · (Wscale · Σ weight · decoded) · B · diag(SV)), cropped to the model's sizes.

    su [rows] and sv [columns] of ±1, as long as the padded matrix; scale [] fp32.
    """

    parts: tuple[Part, ...]
    su: Tensor
    sv: Tensor
    scale: Tensor

    def decode(self) -> Tensor:
        """The matrix between its rotations, [rows, columns] fp32, padding included."""
        size = len(self.su), len(self.sv)
        total = self.parts[0].decode(*size)
        for part in self.parts[1:]:
            total = total + part.decode(*size)
        return total * self.scale.float()

    def dequantize(self, rows: int, columns: int) -> Tensor:
        """W [rows, columns] fp32."""
        right = transform(self.decode()) * self.sv.float()
        left = transform(right.T.contiguous()).T * self.su.float()[:, None]
        return left[:rows, :columns].contiguous()

    def product(self, x: Tensor, rows: int) -> Tensor:
        """x [..., columns of W] → x · Wᵀ [..., rows] in x's dtype: rotated in fp32, multiplied in x's dtype."""
        padded = pad(x.float(), (0, len(self.sv) - x.shape[-1]))
        y = fast_transform(padded * self.sv.float()).to(x.dtype) @ self.decode().to(x.dtype).T
        return (fast_transform(y.float()) * self.su.float())[..., :rows].to(x.dtype)


def joined(gate: Matrix, up: Matrix) -> Matrix:
    """The matrix that was quantized as one, and cut in two by its rows, which its left rotation had mixed."""
    parts = tuple(
        Part(a.kind, torch.cat([a.codes, b.codes]), a.table, a.weight)
        for a, b in zip(gate.parts, up.parts, strict=True)
    )
    return Matrix(parts, torch.cat([gate.su, up.su]), gate.sv, gate.scale)


def are_halves(gate: Matrix, up: Matrix) -> bool:
    """Whether two matrices were quantized as one: then they share all but their left signs.

    Signs are drawn with the same seed for each matrix: those of two of one shape are equal.
    """
    alike = [part.kind for part in gate.parts] == [part.kind for part in up.parts] and len(gate.su) == len(up.su)
    if not alike or not torch.equal(gate.sv, up.sv) or torch.equal(gate.su, up.su):
        return False
    scales = [(gate.scale, up.scale)] + [
        (a.weight, b.weight)
        for a, b in zip(gate.parts, up.parts, strict=True)
        if a.weight is not None and b.weight is not None
    ]
    return all(torch.equal(a, b) for a, b in scales)


@dataclass(frozen=True)
class Embedding:
    """Rows W[r] = (scale[r] · (T[codes[r]] + Σ weight[r] · T[…])) · B · diag(SV); their left side is not rotated.

    codes: of each stage, [rows or more, columns / 8]; scale and weights [rows] fp32.
    """

    codes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]  # of all stages but the first
    scale: Tensor
    sv: Tensor
    table: Tensor

    def rows(self, ids: Tensor, columns: int) -> Tensor:
        """ids [n] → [n, columns] fp32."""
        total = self._stage(self.codes[0], ids)
        for codes, weight in zip(self.codes[1:], self.weights, strict=True):
            total = total + self._stage(codes, ids) * weight[ids].float()[:, None]
        return (transform(total * self.scale[ids].float()[:, None]) * self.sv.float())[:, :columns]

    def dequantize(self, rows: int, columns: int) -> Tensor:
        ids = torch.arange(rows, device=self.scale.device)
        return torch.cat([self.rows(some, columns) for some in ids.split(_ROWS)])

    def _stage(self, codes: Tensor, ids: Tensor) -> Tensor:
        index = shell_codes(codes[ids])
        return self.table.index_select(0, index.flatten()).view(len(ids), -1)[:, : len(self.sv)].float()


@dataclass(frozen=True)
class Tables:
    """The tables of a checkpoint. shell: of matrices with Qidxs; embedding: of a per-layer embedding."""

    shell: Table
    embedding: Table
    variant: str  # of a trellis

    @classmethod
    def of(cls, config: UpstreamConfig, own: Table | None) -> "Tables":
        """own: what the checkpoint's e8_codebook.pt holds, which counts for e8_shell alone."""
        if config.codebook == SHELL and own is not None:
            return cls(own, own, config.variant)
        shell = codebooks.relaxed_table() if config.codebook == RELAXED else codebooks.shell_table()
        return cls(shell, codebooks.shell_table(), config.variant)

    def part(self, kind: str, codes: Tensor, tlut: Tensor | None, weight: Tensor | None) -> Part:
        """A stage with the table that belongs to it, on the device of its codes."""
        if kind != TRELLIS:
            tables = {SHELL: self.shell}.get(kind) or {E8P: codebooks.e8p_table, E81B: codebooks.e81b_table}[kind]()
            return Part(kind, codes, tables.on(codes.device), weight)
        if tlut is None:
            return Part("3inst", codes, trellis.computed_table().on(codes.device), weight)
        return Part("hyb", codes, tlut, weight)


def without_idle(layout: Layout, tensors: Mapping[str, Tensor]) -> Layout:
    """Without the stages of weight 0, which old versions wrote where there is none."""
    stages = [s for s in layout.stages if s.weight is None or bool(torch.any(tensors[s.weight] != 0))]
    return replace(layout, stages=tuple(stages))


def matrix_of(layout: Layout, tensors: Mapping[str, Tensor], tables: Tables) -> Matrix | Embedding:
    """What tensors mean, by the endings of their names."""
    weights = [tensors[s.weight] if s.weight is not None else None for s in layout.stages]
    if layout.embedding:
        codes = tuple(tensors[s.codes] for s in layout.stages)
        later = tuple(w for w in weights if w is not None)
        return Embedding(codes, later, tensors["Wscale"], tensors["SV"], tables.embedding.on(codes[0].device))
    parts = tuple(
        tables.part(s.kind, tensors[s.codes], tensors.get("tlut"), w if w is None else w.reshape(()))
        for s, w in zip(layout.stages, weights, strict=True)
    )
    return Matrix(parts, tensors["SU"], tensors["SV"], tensors["Wscale"].reshape(()))


def check_values(layout: Layout, tensors: Mapping[str, Tensor], tables: Tables) -> None:
    """GlqError for signs that are none, scales that are not finite, and codes that no table row has."""
    for key in ("SV",) if layout.embedding else ("SU", "SV"):
        if not bool((tensors[key].abs() == 1).all()):
            raise GlqError(f"{layout.name}.{key} should hold 1 and −1 alone: the file is damaged, get it again")
    for key in ["Wscale", *(s.weight for s in layout.stages if s.weight is not None)]:
        if not bool(torch.isfinite(tensors[key]).all()):
            raise GlqError(f"{layout.name}.{key} is NaN or infinite: the file is damaged, get it again")
    table = tables.embedding if layout.embedding else tables.shell
    for stage in layout.stages:
        if stage.kind == SHELL and len(table) < codebooks.ROWS:
            largest = int(shell_codes(tensors[stage.codes]).max())
            if largest >= len(table):
                raise GlqError(
                    f"{layout.name}.{stage.codes} has code {largest:,}, but the codebook {len(table):,} rows: "
                    f"{codebooks.FILE} is another checkpoint's, or the file is damaged"
                )
