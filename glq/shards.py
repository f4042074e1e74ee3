"""Safetensors files written a piece at a time: no second copy of what is saved, or joined, is ever in memory.

The bytes are those that safetensors itself would write.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = (  # of types in a file, from the last to the first: wide ones lie in front, so that all are aligned
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
_PIECE = 2**22


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    tensor: Tensor | None = None
    file: Path | None = None
    at: int = 0  # in the file

    def pieces(self) -> Iterator[memoryview | bytes]:
        if self.tensor is not None:
            flat = self.tensor.detach().reshape(-1).view(torch.uint8)
            for piece in flat.split(_PIECE):
                yield memoryview(piece.cpu().numpy())
        elif self.file is not None:
            with self.file.open("rb") as f:
                f.seek(self.at)
                left = self.nbytes
                while left and (piece := f.read(min(left, _PIECE))):
                    left -= len(piece)
                    yield piece
            if left:
                raise OSError(f"{self.file} was cut short")


def save(tensors: dict[str, Tensor], file: Path, written: Callable[[str], None] = lambda _: None) -> None:
    """Write tensors to a file, and wait until they are on the disk. written: gets the name of each that is read."""
    entries = [_Entry(name, _TYPES[t.dtype], tuple(t.shape), t.nbytes, t.contiguous()) for name, t in tensors.items()]
    write_bytes(_pieces(entries, written), file)


def join(parts: Sequence[Path], file: Path) -> tuple[list[str], str]:
    """Write all tensors of some files to one: their names, and its sha256."""
    entries, digest = [entry for part in parts for entry in _entries(part)], hashlib.sha256()
    names = [entry.name for entry in entries]

    def hashed() -> Iterator[memoryview | bytes]:
        for piece in _pieces(entries):
            digest.update(piece)
            yield piece

    write_bytes(hashed(), file)
    return names, digest.hexdigest()


def read_ahead(file: Path, names: Collection[str]) -> None:
    """Read tensors of a file, and keep none: while there is memory to spare, the system does, and has them sooner."""
    for entry in _entries(file):
        if entry.name in names:
            for _ in entry.pieces():
                pass


def write_json(content: Any, file: Path) -> None:
    """In one step: there is the old file or the new one, whatever happens."""
    write_bytes([(json.dumps(content) + "\n").encode()], file)


def write_bytes(pieces: Iterable[memoryview | bytes], file: Path) -> None:
    """The same for bytes."""
    unfinished = file.with_name(f"{file.name}.tmp")
    with unfinished.open("wb", buffering=0) as f:
        for piece in pieces:
            left = memoryview(piece)
            while len(left):
                left = left[f.write(left) :]
        os.fsync(f.fileno())
    os.replace(unfinished, file)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, too."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _pieces(entries: list[_Entry], written: Callable[[str], None] = lambda _: None) -> Iterator[memoryview | bytes]:
    """The bytes of a file of these, which are let go of one by one."""
    ordered = sorted(sorted(entries, key=lambda e: e.name.encode()), key=lambda e: -_ORDER.index(e.dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in ordered:
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    entries.clear()
    ordered.reverse()
    while ordered:
        e = ordered.pop()
        yield from e.pieces()
        written(e.name)


def _entries(file: Path) -> Iterator[_Entry]:
    """Those of a file."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield _Entry(name, entry["dtype"], tuple(entry["shape"]), end - start, None, file, 8 + size + start)
