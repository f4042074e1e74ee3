"""Codecs: how a group of weights becomes an integer and back. One protocol, one literal table."""

from difflib import get_close_matches
from typing import Protocol

from torch import Tensor

from glq.codecs.e8 import FactoredE8, ResidualE8
from glq.codecs.nested import NestedE8
from glq.codecs.trellis import Trellis
from glq.errors import GlqError

__all__ = ["CODECS", "DEFAULT_CODECS", "Codec", "get_codec"]


class Codec(Protocol):
    """Rounds weights close to N(0, 1) to words of `code_bits` bits, each for `group` weights.

    Eight words make a strip (codecs/packing.py). E8 codes every word for itself, so it takes any leading shape; a
    trellis codes the eight words of a strip together.
    """

    def __hash__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def group(self) -> int: ...
    @property
    def code_bits(self) -> int: ...
    @property
    def bits(self) -> float:
        """code_bits / group, exact; scales, signs and padding come on top and are counted by `glq info`."""
        ...

    @property
    def mse(self) -> float:
        """Mean squared error a weight on N(0, 1); the tests measure it again."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8, group] float → codes [..., 8] int64 of code_bits bits. Deterministic; no host sync on CUDA."""
        ...

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """encode(x) and decode(encode(x)), to the bit, in one pass."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """codes [..., 8] int → [..., 8, group] fp32. decode(encode(decode(c))) == decode(c)."""
        ...


_E8_1_5 = FactoredE8("e8-1.5", entries=32, density=0.8, mse=0.1776)
_E8_2 = FactoredE8("e8-2", entries=128, density=1.0, mse=0.0954)

# fmt: off
CODECS: dict[str, Codec] = {
    "e8-1.5": _E8_1_5,
    "e8-2": _E8_2,
    "e8-3.5": ResidualE8("e8-3.5", _E8_2, _E8_1_5, gain=0.31, mse=0.0167),
    "nested-3": NestedE8("nested-3", 6, 24, (.449, .533, .619, .700, .772, .874, 1.014, 1.363), mse=0.0271),
    "nested-3.5": NestedE8("nested-3.5", 8, 28, (.312, .345, .371, .400, .431, .453, .476, .500,
                                                 .525, .551, .594, .640, .689, .760, .860, 1.101), mse=0.0134),
    "nested-4": NestedE8("nested-4", 12, 32, (.224, .267, .302, .333, .368, .406, .471, .682), mse=0.00644),
    "trellis-1.5": Trellis("trellis-1.5", code_bits=24, table_bits=8, mse=0.138),
    "trellis-1.75": Trellis("trellis-1.75", code_bits=28, table_bits=8, mse=0.0986),
    "trellis-2": Trellis("trellis-2", code_bits=32, table_bits=8, mse=0.0699),
    "trellis-2.25": Trellis("trellis-2.25", code_bits=36, table_bits=9, mse=0.0496),
    "trellis-2.5": Trellis("trellis-2.5", code_bits=40, table_bits=9, mse=0.0353),
    "trellis-2.75": Trellis("trellis-2.75", code_bits=44, table_bits=9, mse=0.0252),
    "trellis-3": Trellis("trellis-3", code_bits=48, table_bits=9, mse=0.0180),
    "trellis-3.25": Trellis("trellis-3.25", code_bits=52, table_bits=10, mse=0.0129),
    "trellis-3.5": Trellis("trellis-3.5", code_bits=56, table_bits=10, mse=0.00916),
    "trellis-3.75": Trellis("trellis-3.75", code_bits=60, table_bits=10, mse=0.00665),
    "trellis-4": Trellis("trellis-4", code_bits=64, table_bits=10, mse=0.00478),
}
# fmt: on

# The codec that `--codec auto` takes at each rate: the least KL at equal stored bits (docs/decisions.md).
DEFAULT_CODECS: dict[float, str] = {
    bits: f"trellis-{bits}" for bits in (1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4)
}


def get_codec(name: str) -> Codec:
    """The codec of that name; GlqError names the ones there are."""
    try:
        return CODECS[name]
    except KeyError:
        close = get_close_matches(name, CODECS, n=3, cutoff=0.3) or list(DEFAULT_CODECS.values())
        raise GlqError(f"unknown codec {name!r}; there are {', '.join(close)} and others (docs/FORMAT.md)") from None
