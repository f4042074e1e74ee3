"""Trellis codes: a stream of bits of which every window of 16 is a state, and a state is two weights.

A strip of 128 weights is 64 pairs. Pair p has `step_bits` bits of its own, at bit step_bits · p of the strip's
circular bit string, and its state is the 16 bits that begin there: its own and those of the pairs after it. So
choosing bits well means finding the best path through a trellis of 2^(16 − step_bits) nodes (Viterbi), and decoding
means looking at 16 bits: state → one multiplication → an entry of a small table of pairs, and two signs.
Trellis-coded quantization: Marcellin and Fischer 1990; the bit-shift trellis, its tail-biting and hashed states: QTIP
(arXiv:2406.11235). The tables are trained on N(0, 1) by Lloyd's algorithm (tools/train_trellis.py).
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import torch
from safetensors.torch import load_file
from torch import Tensor

from glq.codecs.viterbi import best_states

STATE_BITS = 16
MULTIPLIER = 0x9E3779B1  # 2^32 / golden ratio: Knuth's multiplicative hash
_PAIRS = 64  # of a strip
_WORD_PAIRS = 8


@dataclass(frozen=True)
class Trellis:
    """step_bits / 2 bits a weight; the table has 2^table_bits pairs of fp16."""

    name: str
    step_bits: int
    table_bits: int
    mse: float  # on N(0, 1)
    group = 16

    @property
    def code_bits(self) -> int:
        return _WORD_PAIRS * self.step_bits

    @property
    def bits(self) -> float:
        return self.code_bits / self.group

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8, 16] float, strips → codes [..., 8] int64, words of code_bits bits."""
        return self.round(x)[0]

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 8, 16] float → codes [..., 8] int64 and their values [..., 8, 16] fp32."""
        table = state_values(self, x.device)
        states = best_states(x.reshape(-1, _PAIRS, 2).float(), table, self.step_bits)
        own = (states & (1 << self.step_bits) - 1).view(-1, 8, _WORD_PAIRS)
        shifts = torch.arange(_WORD_PAIRS, device=x.device) * self.step_bits
        return (own << shifts).sum(-1).view(x.shape[:-1]), table[states].view(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [..., 8] int → [..., 8, 16] fp32."""
        shifts = torch.arange(_WORD_PAIRS, device=codes.device) * self.step_bits
        own = (codes.long()[..., None] >> shifts & (1 << self.step_bits) - 1).flatten(-2)
        states = own.clone()
        for ahead in range(1, -(-STATE_BITS // self.step_bits)):
            states |= own.roll(-ahead, -1) << ahead * self.step_bits
        return state_values(self, codes.device)[states & (1 << STATE_BITS) - 1].view(*codes.shape, self.group)


@cache
def state_values(codec: Trellis, device: torch.device) -> Tensor:
    """[65536, 2] fp32: the pair of each state.

    h = state · MULTIPLIER mod 2^32; bits 14, 13, … of h (table_bits of them) are the entry, bits 15 and 31 the signs.
    """
    state = torch.arange(1 << STATE_BITS)
    h = state * MULTIPLIER & 0xFFFFFFFF
    entry = (h & 0x7FFF) >> 15 - codec.table_bits
    signs = 1 - 2 * torch.stack([h >> 15 & 1, h >> 31 & 1], 1)
    return (_tables()[codec.name].float()[entry] * signs).to(device)


@cache
def _tables() -> dict[str, Tensor]:
    with as_file(files("glq").joinpath("codecs/trellis.safetensors")) as path:
        return load_file(path)
