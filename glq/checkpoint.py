"""Checkpoints: a directory of safetensors and a config.json that says how to read them (docs/FORMAT.md)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glq.config import GlqConfig, ModuleConfig, is_upstream
from glq.errors import GlqError
from glq.files import is_file, read_index, read_json, tensor_shapes
from glq.packed import PACKED_DTYPES, packed_shapes

DIGESTS = "glq_sha256.json"  # of the weight files, so that damage is found where it cannot be seen
_SAFETENSORS = {"torch.uint8": "U8", "torch.float16": "F16"}


@dataclass(frozen=True)
class Summary:
    """Sizes of a checkpoint, counted from its files."""

    config: GlqConfig
    file_bytes: int  # of the safetensors files
    quantized_bytes: int
    quantized_weights: int
    other_bytes: int
    tensors: frozenset[str]  # names of all of them
    module_bits: dict[str, float]  # stored bits a weight of each quantized layer
    files: frozenset[str]  # names of those that hold the tensors

    @property
    def bits(self) -> float:
        """Stored bits a quantized weight, all included."""
        return 8 * self.quantized_bytes / self.quantized_weights


def read_config(path: Path) -> GlqConfig:
    """The quantization_config of a checkpoint directory; GlqError if there is none that this version reads."""
    return GlqConfig.from_dict(_read_raw(path))


def is_upstream_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint of upstream glq. GlqError if it has no config.json that can be read."""
    return is_upstream(_read_raw(path))


def _read_raw(path: Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise GlqError(f"{path} has no config.json: it is not a checkpoint directory")
    raw = read_json(file)
    return raw.get("quantization_config", {}) if isinstance(raw, dict) else {}


def inspect(path: str | Path) -> Summary:
    """Check a whole checkpoint and count its bytes. GlqError names the first thing that is wrong.

    Headers are checked against config.json, and files against the digests that were written with them, if any.
    """
    path = Path(path)
    summary = summarize(path, read_config(path))
    if digests := _digests(path):
        _check_digests(path, digests, summary.files)
    return summary


def file_digest(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def config_digest(config: GlqConfig) -> str:
    """sha256 of a config in one form: two codecs may take tensors of the same shapes, and mean different weights."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _digests(path: Path) -> dict[str, Any]:
    """Of glq_sha256.json; nothing where there is none."""
    file = path / DIGESTS
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict):
        raise GlqError(f"{file} holds no digests: download the checkpoint again")
    return content


def _check_digests(path: Path, digests: dict[str, Any], files: frozenset[str]) -> None:
    expected = digests["sha256"]
    for name in sorted(files | expected.keys()):
        file = path / Path(name).name
        if not is_file(file) or file_digest(file) != expected.get(name):
            raise GlqError(f"{file} is not the file that was written (sha256 differs): download the checkpoint again")


def summarize(path: Path, config: GlqConfig) -> Summary:
    """`inspect` by the headers alone, for a config that was read already."""
    files = read_index(path)
    shapes = tensor_shapes(path, files)
    module_bits, quantized, weights = {}, 0, 0
    for entry, module in config.modules.items():
        nbytes = sum(_packed_bytes(path, shapes, name, module) for name in module.names(entry))
        module_bits[entry] = 8 * nbytes / module.weights
        quantized += nbytes
        weights += module.weights
    file_bytes = sum((path / file).stat().st_size for file in set(files.values()))
    other = sum(nbytes for _, _, nbytes in shapes.values()) - quantized
    if _digests(path).get("config", config_digest(config)) != config_digest(config):
        raise GlqError(f"{path / 'config.json'} has another quantization_config than was written: get it again")
    used = frozenset(files.values())
    return Summary(config, file_bytes, quantized, weights, other, frozenset(files), module_bits, used)


def _packed_bytes(
    path: Path, shapes: dict[str, tuple[str, tuple[int, ...], int]], name: str, module: ModuleConfig
) -> int:
    """Bytes of one quantized matrix, after checking its tensors."""
    total = 0
    for key, shape in packed_shapes(module.codec, module.out_features, module.in_features).items():
        full = f"{name}.{key}"
        if full not in shapes:
            raise GlqError(f"{path}: tensor {full} is missing: the checkpoint is incomplete, get it again")
        dtype, found, nbytes = shapes[full]
        expected = _SAFETENSORS[str(PACKED_DTYPES[key])]
        if found != shape or dtype != expected:
            raise GlqError(
                f"{path}: {full} should be {expected} {list(shape)} (codec {module.codec!r}, weight "
                f"[{module.out_features}, {module.in_features}]), found {dtype} {list(found)}: "
                "the file is damaged or belongs to another config.json"
            )
        total += nbytes
    if f"{name}.weight" in shapes:
        raise GlqError(f"{path}: {name} has packed tensors and a plain weight: which one is meant is unknown")
    return total
