"""Trellis codes: a stream of bits of which every window of 16 is a state, and a state is two weights.

A strip of 128 weights is 64 pairs and 8 · code_bits bits, a circle. Pair p has the bits from ⌊code_bits · p / 8⌋ on,
up to the next pair's, and its state is the 16 bits that begin there: its own and those of the pairs after it. So
choosing bits well means finding the best path through a trellis (Viterbi), and decoding means looking at 16 bits:
state → one multiplication → an entry of a small table of pairs, and two signs.
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
LOOK_UPS = 1024  # entries of a table in which kernels look up pairs
_PAIRS = 64  # of a strip
_WORD_PAIRS = 8


@dataclass(frozen=True)
class Trellis:
    """code_bits / 16 bits a weight; the table has 2^table_bits pairs of fp16."""

    name: str
    code_bits: int  # of a word of 16 weights, a multiple of 4: every pair has as many bits, or every second one more
    table_bits: int  # 8, 9 or 10: of a pair, before its signs
    mse: float  # on N(0, 1)
    group = 16

    @property
    def bits(self) -> float:
        return self.code_bits / self.group

    @property
    def signs(self) -> int:
        """How many of a pair's signs are among the ten bits of its hash that kernels look up."""
        return 10 - self.table_bits

    @property
    def step_bits(self) -> tuple[int, int]:
        """Bits of the even pairs, and of the odd ones."""
        return self.code_bits // 8, self.code_bits // 4 - self.code_bits // 8

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8, 16] float, strips → codes [..., 8] int64, words of code_bits bits."""
        return self.round(x)[0]

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 8, 16] float → codes [..., 8] int64 and their values [..., 8, 16] fp32."""
        table = state_values(self, x.device)
        states = best_states(x.reshape(-1, _PAIRS, 2).float(), table, self.step_bits)
        at, _, mask = _word(self, x.device)
        own = states.view(-1, 8, _WORD_PAIRS) & mask
        return (own << at).sum(-1).view(x.shape[:-1]), table[states].view(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [..., 8] int → [..., 8, 16] fp32."""
        at, width, mask = _word(self, codes.device)
        own = (codes.long()[..., None] >> at & mask).flatten(-2)
        states, filled = own.clone(), width.repeat(8)
        for ahead in range(1, -(-STATE_BITS // min(self.step_bits))):
            states |= own.roll(-ahead, -1) << filled
            filled = filled + width.repeat(8).roll(-ahead)
        return state_values(self, codes.device)[states & (1 << STATE_BITS) - 1].view(*codes.shape, self.group)


@cache
def _word(codec: Trellis, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where in a word the bits of its 8 pairs begin, how many each has, and as many ones: [8] int64 all."""
    ends = torch.arange(_WORD_PAIRS + 1, device=device) * codec.code_bits // _WORD_PAIRS
    return ends[:-1], ends.diff(), (1 << ends.diff()) - 1


@cache
def state_values(codec: Trellis, device: torch.device) -> Tensor:
    """[65536, 2] fp32: the pair of each state."""
    entry, signs = entry_and_signs(codec.table_bits)
    return (pair_table(codec).float()[entry] * signs).to(device)


def entry_and_signs(table_bits: int) -> tuple[Tensor, Tensor]:
    """Of each state, from h = state · MULTIPLIER mod 2^32: [65536] int64, and [65536, 2] that are 1 or -1.

    A kernel looks up ten bits: as many entries, 128 bytes each, fit its memory. With 8 table bits both signs are among
    them, which are bits 15 (the first sign) to 6. Else they are bits 17, 16 and 14 to 7: where they lie they are an
    address, and by bit 15 between them, the first sign, a kernel flips the lower of two fp16, or looks up eleven bits.
    With 9 table bits the second sign is bit 17, and h is four times as large, so that bits of a word above the state
    change none of these. With 10 it is bit 31.
    """
    h = torch.arange(1 << STATE_BITS) * MULTIPLIER * (4 if table_bits == 9 else 1) & 0xFFFFFFFF
    index = h >> 6 & 0x3FF if table_bits == 8 else h >> 7 & 0xFF | h >> 8 & 0x300
    second = {8: 14, 9: 17, 10: 31}[table_bits]
    return index & (1 << table_bits) - 1, 1 - 2 * torch.stack([h >> 15 & 1, h >> second & 1], 1)


def looked_up(codec: Trellis, signs: int) -> Tensor:
    """[2^(table_bits + signs), 2] fp16, on the CPU: pairs with codec.signs of their signs, or the first one, too.

    Those are in the order of the ten bits of a hash, these in that of its bits 17 to 7.
    """
    table = pair_table(codec)
    if codec.signs > 0:
        table = torch.cat([table, table * table.new_tensor([1, -1])])
    if codec.signs == 2:
        table = torch.cat([table, table * table.new_tensor([-1, 1])])
    if signs > codec.signs:
        i = torch.arange(2 * LOOK_UPS)
        table = table[i & 0xFF | i >> 1 & 0x300]
        table[:, 0] *= (1 - 2 * (i >> 8 & 1)).half()
    return table


def pair_table(codec: Trellis) -> Tensor:
    """[2^table_bits, 2] fp16, on the CPU: the pairs before their signs."""
    return _tables()[codec.name]


@cache
def _tables() -> dict[str, Tensor]:
    with as_file(files("glq").joinpath("codecs/trellis.safetensors")) as path:
        return load_file(path)
