"""Safetensors files of a model directory: which tensor is where, checked before anything is read."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from glq.errors import GlqError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_JSON = 100_000_000  # bytes of an index or a config, the limit that safetensors has for its headers


def is_file(file: Path) -> bool:
    """Whether a file is there; a name that no system takes is none."""
    try:
        return file.is_file()
    except (OSError, ValueError):
        return False


def read_json(file: Path) -> Any:
    """The content of a JSON file that nobody vouches for: GlqError if it is none, too deep or too large."""
    try:
        if file.stat().st_size > MOST_JSON:
            raise GlqError(f"{file} has more than {MOST_JSON:,} bytes: do not trust it")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, GlqError):
            raise
        raise GlqError(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def read_index(path: Path) -> dict[str, str]:
    """Names of all tensors of a model directory → names of their files.

    Every file is opened: GlqError for missing, cut or overlapping ones, for an index that names tensors its files do
    not hold, and for names that leave the directory.
    """
    index = path / INDEX
    if index.is_file():
        named = _read_weight_map(index)
    elif (path / SINGLE).is_file():
        named = None
    else:
        raise GlqError(f"{path} has neither {SINGLE} nor {INDEX}: it holds no safetensors weights")
    found: dict[str, str] = {}
    for file in sorted(set(named.values())) if named is not None else [SINGLE]:
        for name in tensor_names(path / file):
            if found.setdefault(name, file) != file:
                raise GlqError(f"{path}: {name} is in {found[name]} and in {file}: the files do not belong together")
    if named is not None and (lost := sorted(name for name, file in named.items() if found.get(name) != file)):
        raise GlqError(f"{index} names {len(lost)} tensors that its files do not hold, first {lost[0]}")
    return found


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors of one file; GlqError if it is missing or damaged."""
    if not is_file(file):
        raise GlqError(f"{file} is missing: the model directory is incomplete")
    with opened(file) as f:
        return list(f.keys())


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; GlqError if it is damaged, which its header alone can say."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except (SafetensorError, OSError, RuntimeError) as error:
        raise GlqError(f"{file} is damaged ({error}): download or quantize it again") from error


def tensor_shapes(path: Path, files: dict[str, str]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor name → (safetensors dtype, shape, bytes), from the headers alone."""
    shapes = {}
    for file in sorted(set(files.values())):
        with opened(path / file) as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                view = f.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                shapes[name] = (dtype, shape, math.prod(shape) * _bits(dtype) // 8)
    return shapes


def _bits(dtype: str) -> int:
    """Bits of one element: the number in the dtype's name (F16, BF16, U8, F8_E4M3, …), 8 for BOOL."""
    digits = dtype.split("_")[0].lstrip("BFIUC")
    return int(digits) if digits.isdigit() else 8


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        named = read_json(index)["weight_map"]
        good = isinstance(named, dict) and all(isinstance(v, str) for v in named.values())
    except (KeyError, TypeError):
        good = False
    if not good:
        raise GlqError(f"{index} is not a safetensors index: download or quantize the model again")
    for file in set(named.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise GlqError(
                f"{index} names {file!r}, which is not a safetensors file of this directory: do not trust it"
            )
    return named
