"""An upstream checkpoint directory: what it holds, checked by headers, and its matrices one at a time."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from glq.config import is_upstream
from glq.errors import GlqError
from glq.files import read_index, tensor_shapes
from glq.upstream import codebooks
from glq.upstream.format import SHELL, Header, Layout, UpstreamConfig, find_layouts
from glq.upstream.matrix import Embedding, Matrix, Tables, are_halves, check_values, joined, matrix_of, without_idle

_HALVES = {"gate_proj": "up_proj", "w1": "w3"}  # matrices of an MLP that may have been quantized as one


class UpstreamCheckpoint:
    """Its layouts by name, tables and files. GlqError for whatever is not whole or not known."""

    def __init__(self, path: Path, config: UpstreamConfig) -> None:
        self.path, self.config = path, config
        self.files = read_index(path)
        self.headers: Mapping[str, Header] = tensor_shapes(path, self.files)
        self.layouts: Mapping[str, Layout] = find_layouts(self.headers, config)
        own = path / codebooks.FILE
        found = codebooks.read_table(own) if config.codebook == SHELL and own.is_file() else None
        self.tables = Tables.of(config, found)

    @property
    def packed_names(self) -> set[str]:
        """The names of the tensors of all quantized matrices; a bias is none of them."""
        return {
            f"{name}.{ending}" for name, layout in self.layouts.items() for ending in layout.tensors if ending != "bias"
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized matrices, padding included."""
        return sum(self.headers[name][2] for name in self.packed_names)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of the files, on the CPU."""
        found = {}
        try:
            with ExitStack() as stack:
                files = {
                    file: stack.enter_context(safe_open(self.path / file, "pt"))
                    for file in {self.files[name] for name in names}
                }
                found = {name: files[self.files[name]].get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise GlqError(f"{self.path} is damaged ({error}): get it again") from error
        return found

    def matrix(self, name: str) -> Matrix | Embedding:
        """A matrix, or a half of one, as it is stored. GlqError for values that cannot be."""
        layout = self.layouts[name]
        tensors = self.read([f"{name}.{ending}" for ending in layout.tensors])
        own = {ending: tensors[f"{name}.{ending}"] for ending in layout.tensors}
        check_values(layout, own, self.tables)
        return matrix_of(without_idle(layout, own), own, self.tables)

    def weight(self, name: str, rows: int, columns: int) -> Tensor:
        """The weight of a module [rows, columns] fp32. GlqError if the stored matrix is smaller."""
        check_sizes(self.layouts[name], rows, columns)
        own = self.matrix(name)
        other = other_half(name)
        if isinstance(own, Embedding) or other not in self.layouts:
            return own.dequantize(rows, columns)
        twin = self.matrix(other)
        if isinstance(twin, Embedding):
            return own.dequantize(rows, columns)
        gate, up = (own, twin) if is_gate(name) else (twin, own)
        if not are_halves(gate, up):
            return own.dequantize(rows, columns)
        both = joined(gate, up).dequantize(2 * rows, columns)
        return both[:rows] if is_gate(name) else both[rows:]


def read_upstream(path: Path) -> UpstreamCheckpoint:
    """The checkpoint in a directory. GlqError if it is not one of upstream's."""
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise GlqError(f"{file} cannot be read: {error}") from error
    if not is_upstream(raw):
        raise GlqError(f"{path} is no checkpoint of upstream glq: its config.json names no codebook")
    return UpstreamCheckpoint(path, UpstreamConfig.from_dict(raw))


def check_sizes(layout: Layout, rows: int, columns: int) -> None:
    """GlqError if a matrix of the model has more rows or columns than what is stored, or far fewer."""
    fits = rows <= layout.rows < 2 * rows + 16 and columns <= layout.columns < 2 * columns + 64
    if not fits:
        raise GlqError(
            f"{layout.name}: the checkpoint has a matrix of {layout.rows} × {layout.columns} with its padding, the "
            f"model one of {rows} × {columns}: config.json is not its own"
        )


def is_gate(name: str) -> bool:
    return name.rpartition(".")[2] in _HALVES


def other_half(name: str) -> str:
    """The name of the matrix that may have been quantized together with this one; empty if there is none."""
    parent, _, leaf = name.rpartition(".")
    other = (_HALVES | {up: gate for gate, up in _HALVES.items()}).get(leaf)
    return "" if other is None else f"{parent}.{other}"
