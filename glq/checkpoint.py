"""Checkpoints: a directory of safetensors and a config.json that says how to read them (docs/FORMAT.md)."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from glq.config import GlqConfig
from glq.errors import GlqError
from glq.files import INDEX, SINGLE, read_index, tensor_shapes
from glq.packed import PACKED_DTYPES, packed_shapes

SHARD_BYTES = 4 * 2**30
_SAFETENSORS = {"torch.uint8": "U8", "torch.float16": "F16"}


class CheckpointWriter:
    """Writes a checkpoint beside `out`, and moves it there when everything is on disk.

    Used as a context manager: whatever is raised inside leaves no trace of the unfinished directory. GlqError if
    `out` exists and is not an empty directory, or cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise GlqError(f"{self.out} exists and is not an empty directory: nothing is overwritten, name another one")
        try:
            self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._dir = Path(
                tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".partial", dir=self.out.absolute().parent)
            )
        except OSError as error:
            raise GlqError(f"cannot write to {self.out.absolute().parent}: {error.strerror}") from error
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        shutil.rmtree(self._dir, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors over; written as soon as they fill a shard."""
        for name, tensor in tensors.items():
            self._pending[name] = tensor.detach().cpu().contiguous()
            self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def add_file(self, source: Path) -> None:
        """Copy a file under its own name."""
        shutil.copyfile(source, self._dir / source.name)

    def add_json(self, name: str, content: dict[str, Any]) -> None:
        (self._dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def add_text(self, name: str, content: str) -> None:
        (self._dir / name).write_text(content, encoding="utf-8")

    def commit(self) -> None:
        """Name the shards, write the index, and move the directory to its place in one step."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            (self._dir / f"shard-{i}").rename(self._dir / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            total = sum(f.stat().st_size for f in self._dir.glob("*.safetensors"))
            self.add_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._dir.chmod(0o755)
        if self.out.exists():
            self.out.rmdir()
        os.replace(self._dir, self.out)

    def _flush(self) -> None:
        file = self._dir / f"shard-{len(self._shards)}"
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except OSError as error:
            raise GlqError(f"cannot write {self.out}: {error}. Free some space and start again") from error
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0


@dataclass(frozen=True)
class Summary:
    """Sizes of a checkpoint, counted from its files."""

    config: GlqConfig
    file_bytes: int  # of the safetensors files
    quantized_bytes: int
    quantized_weights: int
    other_bytes: int
    module_bits: dict[str, float]  # stored bits a weight of each quantized layer

    @property
    def bits(self) -> float:
        """Stored bits a quantized weight, all included."""
        return 8 * self.quantized_bytes / self.quantized_weights


def read_config(path: Path) -> GlqConfig:
    """The quantization_config of a checkpoint directory; GlqError if there is none that this version reads."""
    file = Path(path) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GlqError(f"{path} has no config.json: it is not a checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise GlqError(f"{file} cannot be read: {error}") from error
    return GlqConfig.from_dict(raw.get("quantization_config", {}) if isinstance(raw, dict) else {})


def inspect(path: Path) -> Summary:
    """Check a whole checkpoint by its headers and count its bytes. GlqError names the first thing that is wrong."""
    path = Path(path)
    config = read_config(path)
    return summarize(path, config)


def summarize(path: Path, config: GlqConfig) -> Summary:
    """`inspect` for a config that was read already."""
    files = read_index(path)
    shapes = tensor_shapes(path, files)
    module_bits, quantized, weights = {}, 0, 0
    for name, module in config.modules.items():
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
        module_bits[name] = 8 * total / module.weights
        quantized += total
        weights += module.weights
    file_bytes = sum((path / file).stat().st_size for file in set(files.values()))
    other = sum(nbytes for _, _, nbytes in shapes.values()) - quantized
    return Summary(config, file_bytes, quantized, weights, other, module_bits)
