"""The highest rate at which a model and its context fit into so much memory: `--fit 12GB --context 16384`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glq.arguments import format_bytes
from glq.codecs import DEFAULT_CODECS
from glq.embedding import embedding_scale
from glq.errors import GlqError
from glq.footprint import WORKSPACE, Footprint, Rates, context_bytes, weight_bytes
from glq.hub import resolve
from glq.pipeline import Settings
from glq.source import SourceModel

LEFT = 0.05  # of the memory, for CUDA itself and for what the allocator cannot use
_OUTSIDE = 4  # bits of embeddings and lm_head where these are packed
_WORTH = 0.5  # bits of the layers that packing embeddings and lm_head must gain


@dataclass(frozen=True)
class Option:
    """A rate, and what it takes. outside: bits of embeddings and lm_head; None: as they are."""

    bits: float
    outside: int | None
    footprint: Footprint


@dataclass(frozen=True)
class Fit:
    """options: every rate, from the highest on; best: the one to take."""

    model: str
    memory: int
    context: int
    kv_bits: int | None
    plain: Footprint  # of the model as it is
    options: tuple[Option, ...]
    best: Option

    @property
    def usable(self) -> float:
        return self.memory * (1 - LEFT)

    def fits(self, footprint: Footprint) -> bool:
        return footprint.total <= self.usable

    @property
    def original_fits(self) -> bool:
        return self.fits(self.plain)

    def settings(self, settings: Settings) -> Settings:
        """With the rates of `best`."""
        outside = self.best.outside
        return replace(settings, bits=self.best.bits, codec="auto", embeddings=outside, head=outside)

    def command(self, out: str = "OUT") -> str:
        """What makes it."""
        outside = "" if self.best.outside is None else f" --embeddings {self.best.outside} --head {self.best.outside}"
        return f"glq quantize {self.model} {out} --bits {self.best.bits:g}{outside}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "memory": self.memory,
            "context": self.context,
            "kv_bits": self.kv_bits,
            "bits": self.best.bits,
            "outside_bits": self.best.outside,
            **asdict(self.best.footprint),
        }


def fit(model: str | Path, memory: int, context: int, kv_bits: int | None = None) -> Fit:
    """The best that fits into `memory` bytes with `context` tokens. GlqError if nothing does, with what is missing.

    Embeddings and lm_head keep their 16 bits unless packing them gains half a bit for the layers.
    """
    if context < 2:
        raise GlqError(f"--context must be at least 2 tokens, found {context}")
    source = SourceModel(resolve(model))

    def of(rates: Rates | None, taken: tuple[int, int]) -> Footprint:
        return Footprint(weight_bytes(source, rates), *taken)

    plain = of(None, context_bytes(source, None, context, kv_bits))
    options: list[Option] = []
    for outside in (None, _OUTSIDE) if _packs_embeddings(source) else (None,):
        codec = None if outside is None else DEFAULT_CODECS[outside]
        all_rates = {bits: Rates(layers, codec, codec) for bits, layers in DEFAULT_CODECS.items()}
        taken = context_bytes(source, all_rates[max(all_rates)], context, kv_bits)
        options += [Option(bits, outside, of(rates, taken)) for bits, rates in all_rates.items()]
    options.sort(key=lambda o: (-o.bits, o.outside is not None))
    usable = memory * (1 - LEFT)
    fitting = [o for o in options if o.footprint.total <= usable]
    if not fitting:
        least = min(options, key=lambda o: o.footprint.total)
        part = least.footprint
        rate = f"{least.bits:g} bits" + (
            "" if least.outside is None else f", embeddings and lm_head at {least.outside},"
        )
        weights, cache, way = map(format_bytes, (part.weights, part.kv, part.activations))
        alone = part.weights + WORKSPACE > usable
        raise GlqError(
            f"{model} does not fit into {format_bytes(memory)}: at {rate} it takes {weights} of weights, {cache} of KV "
            f"cache and {way} of activations, and {LEFT:.0%} are left free. "
            + ("No --context is short enough: take a smaller model" if alone else "Take a shorter --context")
        )
    return Fit(str(model), memory, context, kv_bits, plain, tuple(options), _best(fitting))


def _packs_embeddings(source: SourceModel) -> bool:
    try:
        embedding_scale(source.module(source.embeddings))
    except GlqError:
        return False
    return True


def _best(fitting: list[Option]) -> Option:
    """The highest rate with embeddings as they are, or packed, if that gains enough."""
    plain = next((o for o in fitting if o.outside is None), None)
    packed = next((o for o in fitting if o.outside is not None), None)
    if plain is None or packed is None:
        return plain or packed or fitting[0]
    return packed if packed.bits >= plain.bits + _WORTH else plain
