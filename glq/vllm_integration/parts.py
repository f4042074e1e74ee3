"""Which rows and columns of which matrices one rank of a layer holds, and how they lie in its tensors.

A layer of vLLM may be several matrices of a checkpoint (q, k and v, say), each of a codec of its own, and a rank of a
tensor-parallel group has some rows or some columns of each. It keeps three tensors: codes [bytes], the tiles of one
part after the other; scale [rows], of all parts; signs [parts, columns / 8].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glq.codecs import get_codec
from glq.codecs.packing import TILE_COLS, tile_rows
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.ops.matmul import matmul
from glq.packed import PACKED_DTYPES, PackedLinear, packed_shapes

_QKV = {"q": 0, "k": 1, "v": 2}
_PADDING = 64  # vLLM pads a vocabulary to a multiple


@dataclass(frozen=True)
class Rank:
    """One of `size` in a tensor-parallel group."""

    index: int
    size: int


@dataclass(frozen=True)
class Part:
    """Rows first_row … and columns first_column … of a matrix of the checkpoint; rows beyond its end are padding."""

    codec: str
    block: int
    first_row: int
    rows: int
    first_column: int
    columns: int

    @property
    def tiles(self) -> tuple[int, ...]:
        """[row tiles, column tiles, tile bytes]"""
        return packed_shapes(self.codec, self.rows, self.columns)["codes"]

    @property
    def nbytes(self) -> int:
        return prod(self.tiles)

    @property
    def scale_bytes(self) -> int:
        return self.rows * PACKED_DTYPES["scale"].itemsize

    @property
    def signs_bytes(self) -> int:
        return -(-self.columns // 8)

    def of_codes(self, codes: Tensor) -> Tensor:
        """This part of a matrix's codes."""
        row, column = self.first_row // tile_rows(get_codec(self.codec).group), self.first_column // TILE_COLS
        return codes[row : row + self.tiles[0], column : column + self.tiles[1]]

    def of_scale(self, scale: Tensor) -> Tensor:
        """This part of a matrix's scales."""
        return scale[self.first_row : self.first_row + self.rows]

    def of_signs(self, signs: Tensor) -> Tensor:
        """This part of a matrix's signs."""
        return signs[self.first_column // 8 : -(-(self.first_column + self.columns) // 8)]


def cut(modules: Mapping[str, ModuleConfig], rows: Sequence[int], columns: int, rank: Rank) -> tuple[Part, ...]:
    """The parts of a layer on a rank.

    modules: its matrices; rows: of each of its outputs (q, k, v, …) on this rank; columns: of its input there. Either a
    matrix for each output, or one for all of them. GlqError where tiles or blocks of the rotation would be cut.
    """
    names = list(modules)
    if len(names) == len(rows):
        return tuple(_part(name, modules[name], n, columns, rank) for name, n in zip(names, rows, strict=True))
    if len(names) > 1:
        raise GlqError(
            f"{', '.join(names)}: vLLM fuses these to {len(rows)} outputs, which glq does not know how to do"
        )
    (name,) = names
    module, shards = modules[name], modules[name].out_features // sum(rows)
    if shards not in (1, rank.size) or module.out_features != shards * sum(rows):
        raise GlqError(f"{name}: its {module.out_features} rows cannot be cut to {rank.size} ranks: use fewer")
    if rank.size == 1:  # nothing is cut, wherever outputs begin
        return (_part(name, module, module.out_features, columns, rank),)
    starts = [shards * start for start in accumulate(rows, initial=0)]
    outputs = [ModuleConfig(module.codec, module.in_features, shards * n, module.block) for n in rows]
    return tuple(
        _part(name, output, n, columns, rank, start) for output, n, start in zip(outputs, rows, starts, strict=False)
    )


def _part(name: str, module: ModuleConfig, rows: int, columns: int, rank: Rank, start: int = 0) -> Part:
    """`rows` of the module's rows, which begin at row `start` of a matrix."""
    across, down = module.in_features // columns, module.out_features // rows
    whole = across * columns == module.in_features and down * rows == module.out_features
    if not whole or across not in (1, rank.size) or rank.size % down:
        raise GlqError(
            f"{name}: the checkpoint has a [{module.out_features}, {module.in_features}] weight, of which [{rows}, "
            f"{columns}] on each of {rank.size} ranks is no equal share: config.json is not this model's, or take "
            "another tensor-parallel size"
        )
    if across > 1 and (columns % TILE_COLS or columns % module.block):
        raise GlqError(
            f"{name}: {rank.size} shards of {columns} input channels would cut tiles of {TILE_COLS} or blocks of the "
            f"rotation, {module.block} wide: quantize with --tp {rank.size}, or take another tensor-parallel size"
        )
    first = start + rank.index * down // rank.size * rows
    check_rows(name, module.codec, first, rows, start + module.out_features)
    return Part(module.codec, module.block, first, rows, rank.index * columns if across > 1 else 0, columns)


def padded_vocabulary(size: int) -> int:
    """The rows that vLLM makes of a vocabulary, and shares out to the ranks."""
    return -(-size // _PADDING) * _PADDING


def vocabulary_part(name: str, module: ModuleConfig, padded: int, rank: Rank) -> Part:
    """A rank's equal share of embeddings or an lm_head, whose rows vLLM pads to `padded`."""
    rows = padded // rank.size
    check_rows(name, module.codec, rank.index * rows, rows, padded)
    return Part(module.codec, module.block, rank.index * rows, rows, 0, module.in_features)


def check_rows(name: str, codec: str, first: int, rows: int, end: int) -> None:
    """GlqError if rows first … first + rows − 1, of those before `end`, begin or end inside a tile."""
    height = tile_rows(get_codec(codec).group)
    if first % height or (rows % height and first + rows < end):
        raise GlqError(
            f"{name}: shards of {rows} rows would cut tiles of {height} rows: take a smaller tensor-parallel size"
        )


class Run(NamedTuple):
    """Neighbouring parts that one product takes. Constants alone, for torch.compile."""

    codec: str
    block: int
    first_byte: int
    end_byte: int
    tiles: tuple[int, ...]
    first_row: int
    end_row: int
    signs: int  # which of the layer's


def runs(parts: Sequence[Part], signs: Tensor) -> tuple[Run, ...]:
    """Parts side by side where their codec and rotation are the same and the upper one ends with a whole tile."""
    found: list[Run] = []
    byte = row = 0
    for i, part in enumerate(parts):
        run = Run(part.codec, part.block, byte, byte + part.nbytes, part.tiles, row, row + part.rows, i)
        byte, row = run.end_byte, run.end_row
        if found and _joins(found[-1], run, signs):
            upper = found.pop()
            tall = (upper.tiles[0] + run.tiles[0], *run.tiles[1:])
            run = upper._replace(end_byte=run.end_byte, tiles=tall, end_row=run.end_row)
        found.append(run)
    return tuple(found)


def _joins(upper: Run, lower: Run, signs: Tensor) -> bool:
    height = tile_rows(get_codec(upper.codec).group)
    alike = (upper.codec, upper.block) == (lower.codec, lower.block) and torch.equal(
        signs[upper.signs], signs[lower.signs]
    )
    return alike and (upper.end_row - upper.first_row) % height == 0


def multiply(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, layer_runs: Sequence[Run]) -> Tensor:
    """x [..., columns] → [..., rows] of all parts, by as many calls of glq::matmul as there are runs."""
    done = [
        matmul(
            x, codes_of(codes, run), scale[run.first_row : run.end_row], signs[run.signs], run.codec, rows, run.block
        )
        for run in layer_runs
        for rows in (run.end_row - run.first_row,)
    ]
    return done[0] if len(done) == 1 else torch.cat(done, -1)


def codes_of(codes: Tensor, run: Run) -> Tensor:
    """The tiles of a run, a view."""
    return codes[run.first_byte : run.end_byte].view(run.tiles)


def dequantize(codes: Tensor, scale: Tensor, signs: Tensor, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """The weight of a layer [rows, columns] in the model's own basis."""
    done, byte, row = [], 0, 0
    for part, s in zip(parts, signs, strict=True):
        tiles = codes[byte : byte + part.nbytes].view(part.tiles)
        rows = scale[row : row + part.rows]
        packed = PackedLinear(part.codec, part.rows, part.columns, part.block, tiles, rows, s)
        done.append(packed.dequantize().to(dtype))
        byte, row = byte + part.nbytes, row + part.rows
    return torch.cat(done)


@dataclass(frozen=True)
class Loader:
    """Copies a tensor of the checkpoint into a layer's: what vLLM calls with (parameter, tensor, which output).

    The parameter's attribute glq_missing is the set of parts that have not come yet.
    """

    name: str  # of the layer's tensor: codes, scale or signs
    parts: tuple[Part, ...]

    def __call__(self, param: Any, loaded: Tensor, shard: Any = None) -> None:
        views = list(self._views(param.data))
        for i in range(len(views)) if shard is None else [_QKV.get(str(shard), shard)]:
            if i not in range(len(views)):
                raise GlqError(
                    f"vLLM loads {shard!r} of a layer of {len(views)} parts, which glq does not know how to do"
                )
            piece = getattr(self.parts[i], f"of_{self.name}")(loaded)
            views[i][: len(piece)].copy_(piece)
            views[i][len(piece) :].zero_()
            param.glq_missing.discard(i)

    def _views(self, data: Tensor) -> Iterator[Tensor]:
        if self.name == "signs":
            yield from data
        elif self.name == "scale":
            yield from data.split([part.rows for part in self.parts])
        else:
            flat = data.split([part.nbytes for part in self.parts])
            yield from (codes.view(part.tiles) for codes, part in zip(flat, self.parts, strict=True))
