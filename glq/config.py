"""What config.json says of a quantized model: frozen dataclasses, to and from plain dictionaries."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from glq.codecs import get_codec
from glq.errors import GlqError

FORMAT_VERSION = 3
_OLDER = 2  # which differs in these codecs alone
_NEW_CODECS = {"trellis-2.25", "trellis-2.5", "trellis-2.75", "trellis-3"}
QUANT_METHOD = "glq"


@dataclass(frozen=True)
class ModuleConfig:
    """One quantized linear layer, `out_features` × `in_features`, or one of each expert of a layer.

    The name of an entry with `experts` has a `*`, which stands for the number of the expert, 0 … experts − 1.
    """

    codec: str
    in_features: int
    out_features: int
    block: int  # width of the rotation's blocks; divides in_features
    experts: int | None = None

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features * (self.experts or 1)

    def names(self, entry: str) -> Iterator[str]:
        """The names of the matrices that the config's entry of this name stands for."""
        return iter([entry]) if self.experts is None else (entry.replace("*", str(e)) for e in range(self.experts))

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __post_init__(self) -> None:
        get_codec(self.codec)
        for key in ("in_features", "out_features", "block", "experts"):
            value = getattr(self, key)
            if key == "experts" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise GlqError(f"quantization_config: {key} must be a positive integer, found {value!r}")
        if self.in_features % self.block:
            raise GlqError(f"quantization_config: block {self.block} does not divide in_features {self.in_features}")


@dataclass(frozen=True)
class GlqConfig:
    """The `quantization_config` of config.json."""

    modules: dict[str, ModuleConfig]
    bits: float  # stored bits a quantized weight, all included
    version: str  # of glq that wrote it
    tensor_parallel: int = 1  # shards of the input that no block of the rotation crosses, in row-parallel layers

    def to_dict(self) -> dict[str, Any]:
        degree = {} if self.tensor_parallel == 1 else {"tensor_parallel": self.tensor_parallel}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "glq_version": self.version,
            "bits": self.bits,
            **degree,
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "GlqConfig":
        """Refuses what it does not know, by name: GlqError."""
        if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
            raise GlqError("config.json has no quantization_config of quant_method 'glq': not a glq checkpoint")
        if is_upstream(raw):
            raise GlqError(
                f"the checkpoint is upstream glq's (codebook {raw['codebook']!r}): it loads in transformers and vLLM, "
                "but this takes it only as `glq convert --dense` writes it"
            )
        version = raw.get("format_version")
        if type(version) is not int or version < 1:
            raise GlqError(
                f"quantization_config: format_version must be an integer of at least 1, found {version!r}. "
                "Checkpoints of other projects named glq are not read"
            )
        if version < _OLDER:
            raise GlqError(
                f"the checkpoint has format version {version}, of before the first release, whose trellis codes "
                "meant other values: quantize the model again"
            )
        if version > FORMAT_VERSION:
            raise GlqError(
                f"the checkpoint has format version {version}, written by glq {raw.get('glq_version')}; this glq reads "
                f"{FORMAT_VERSION}: install a newer one from its repository"
            )
        known = {"quant_method", "format_version", "glq_version", "bits", "modules"}
        _refuse_unknown("quantization_config", raw, known | {"tensor_parallel"})
        if lost := sorted(known - raw.keys()):
            raise GlqError(f"quantization_config lacks {', '.join(lost)}: config.json is damaged")
        if not isinstance(raw["modules"], dict) or not raw["modules"]:
            raise GlqError("quantization_config: modules must name at least one quantized layer")
        if type(raw["bits"]) not in (int, float) or not math.isfinite(raw["bits"]):
            raise GlqError(f"quantization_config: bits must be a number, found {raw['bits']!r}")
        degree = raw.get("tensor_parallel", 1)
        if type(degree) is not int or degree < 1:
            raise GlqError(f"quantization_config: tensor_parallel must be a positive integer, found {degree!r}")
        modules = {name: _module(name, entry) for name, entry in raw["modules"].items()}
        if version == _OLDER and (changed := sorted({m.codec for m in modules.values()} & _NEW_CODECS)):
            raise GlqError(
                f"the checkpoint has format version {version}, of before the first release, in which "
                f"{', '.join(changed)} meant other values: quantize the model again"
            )
        return cls(modules=modules, bits=raw["bits"], version=str(raw["glq_version"]), tensor_parallel=degree)


def is_upstream(raw: Any) -> bool:
    """Whether a quantization_config is upstream glq's: it has no format_version, and always a codebook."""
    named = isinstance(raw, Mapping) and raw.get("quant_method", QUANT_METHOD) == QUANT_METHOD
    return named and "format_version" not in raw and "codebook" in raw


def _module(name: str, entry: Any) -> ModuleConfig:
    where = f"quantization_config.modules[{name!r}]"
    known = set(ModuleConfig.__dataclass_fields__) - {"experts"}
    if not isinstance(entry, dict):
        raise GlqError(f"{where}: expected an object with {', '.join(sorted(known))}, found {entry!r}")
    _refuse_unknown(where, entry, known | {"experts"})
    if lost := sorted(known - entry.keys()):
        raise GlqError(f"{where} lacks {', '.join(lost)}: config.json is damaged")
    if not isinstance(entry["codec"], str):
        raise GlqError(f"{where}: codec must be a string, found {entry['codec']!r}")
    if (stars := name.count("*")) != int(entry.get("experts") is not None):
        raise GlqError(f"{where}: a name has one * where the entry has experts, and none elsewhere, found {stars}")
    return ModuleConfig(**entry)


def _refuse_unknown(where: str, raw: dict[str, Any], known: set[str]) -> None:
    if extra := sorted(raw.keys() - known):
        raise GlqError(f"{where} has unknown keys {', '.join(extra)}: a newer glq wrote it, or it was edited by hand")
