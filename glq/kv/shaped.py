"""Words of E8 for a KV cache, which decode in few instructions: E8 from the Hamming code, shaped by D8.

Eight numbers become the point of step·(Λ + s) nearest to them. Λ are the vectors of integers whose parities are a word
of the extended Hamming code of length 8: √2·E8, turned. A point is kept modulo q·D8, q = 2^bits: q⁸/8 codewords, those
in the Voronoi region of q·D8. With three bits for the step, the one of eight that loses least, they fill a word. Nested
E8 (glq.codecs.nested) has a better region, but fewer points, for 12⁸ is no power of two: the two lose the same. Here
there is one coset to look at instead of two, and no digit in base 3.

A point's coordinates are wrapped into [-q/2, q/2), and if that took q away an odd number of times, the largest one goes
to its other side. s = ½ + i/16 for coordinate i, so that no two coordinates are of one size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq.codecs.lattice import constant, nearest_e8

_CHUNK = 32768  # columns at once: enough for two cores, little enough for their caches
_SHIFT = tuple(0.5 + i / 16 for i in range(8))
STEP_UNIT = 512  # steps are multiples of 1/512, and below q/32 (1/2, at 3 bits 1 is as far as fp16 goes in kernels)


@dataclass(frozen=True)
class ShapedE8:
    """Of 4 or 3 bits a channel. A word has eight fields of so many bits, the lowest one first.

    Field i is coordinate i - s plus q/2. The lowest bits of fields 4 to 7 are known from those of 0 to 3: each is that
    of the field four below, plus the sum of all four, modulo 2. In their place are, in field 4, whether the largest
    coordinate is on its other side, and in 5, 6, 7 bits 0, 1, 2 of the index of the step.
    """

    name: str
    field: int  # bits
    steps: tuple[int, ...]  # in units of 1 / STEP_UNIT, increasing
    mse: float  # on N(0, 1)
    group = 8

    @property
    def q(self) -> int:
        return 1 << self.field

    @property
    def code_bits(self) -> int:
        return 8 * self.field

    @property
    def bits(self) -> float:
        return float(self.field)

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8] float → codes [...] int64."""
        return self.round(x)[0]

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 8] float → codes [...] int64 and their values [..., 8] fp32.

        A vector beyond every step's reach is rounded as well as if it were clamped, at least.
        """
        flat = x.reshape(-1, 8)
        size = _CHUNK // (len(self.steps) + 1) if x.device.type == "cpu" else max(flat.shape[0], 1)
        parts = [self._round(part.T.float().contiguous()) for part in flat.split(size)]
        codes, values = parts[0] if len(parts) == 1 else (torch.cat(p, -1) for p in zip(*parts, strict=True))
        return codes.view(x.shape[:-1]), values.T.reshape(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] int → [..., 8] fp32."""
        flat = codes.reshape(-1)
        parts = [self._decode(part.long()).T for part in flat.split(_CHUNK if codes.device.type == "cpu" else 2**20)]
        return torch.cat(parts).reshape(*codes.shape, 8)

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [8, n] fp32 → codes [n] int64, values [8, n]: every step is tried, the largest one twice.

        The second time on the vector pulled inside its reach: one of norm (q - 2)/√2 steps rounds to a point inside the
        region (inradius less covering radius).
        """
        n = x.shape[1]
        step = self._steps(x.device, (*self.steps, self.steps[-1]))[:, None]
        reach = self.steps[-1] / STEP_UNIT * (self.q - 2) / 2**0.5
        t = x[:, None] / step
        t[:, -1] *= (reach / x.square().sum(0).sqrt_().clamp_min_(1e-30)).clamp_max_(1.0)
        point = _turn_back(nearest_e8(_turn((t - self._shift(x.device)[:, None]).view(8, -1))))
        turns = ((point + self.q / 2) / self.q).floor_()
        fields = point + self.q / 2 - self.q * turns
        odd = turns.sum(0).remainder_(2)
        values = self._values(fields, odd).view(8, -1, n) * step
        choice = (x[:, None] - values).square_().sum(0).argmin(0, keepdim=True)
        pick = choice.expand(8, 1, n)
        fields = fields.view(8, -1, n).gather(1, pick)[:, 0]
        odd = odd.view(-1, n).gather(0, choice)[0]
        return self._pack(fields.long(), odd.long(), choice[0].clamp_max(7)), values.gather(1, pick)[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        """codes [n] int64 → [8, n] fp32."""
        i = torch.arange(0, self.code_bits, self.field, device=codes.device)[:, None]
        fields = codes >> i & self.q - 1
        spare = fields[4:] & 1
        low = fields[:4] & 1
        fields[4:] += (low ^ low.sum(0) & 1) - spare
        scale = spare[1] + 2 * spare[2] + 4 * spare[3]
        return self._values(fields.float(), spare[0].float()) * self._steps(codes.device, self.steps)[scale]

    def _values(self, fields: Tensor, odd: Tensor) -> Tensor:
        """fields [8, n] and whether the largest goes to its other side [n] → [8, n] in steps; exact."""
        v = fields - self.q / 2 + self._shift(fields.device)
        size = v.abs()
        largest = (size == size.amax(0)).float()
        return v.addcmul_(largest.copysign_(v), odd, value=-self.q)

    def _pack(self, fields: Tensor, odd: Tensor, scale: Tensor) -> Tensor:
        """fields [8, n], odd and the index of the step [n] → codes [n]; all int64."""
        spare = torch.stack([odd, scale & 1, scale >> 1 & 1, scale >> 2])
        fields[4:] += spare - (fields[4:] & 1)
        i = torch.arange(0, self.code_bits, self.field, device=fields.device)[:, None]
        return (fields << i).sum(0)

    @staticmethod
    def _shift(device: torch.device) -> Tensor:
        return constant(_SHIFT, device)[:, None]

    @staticmethod
    def _steps(device: torch.device, steps: tuple[int, ...]) -> Tensor:
        return constant(tuple(s / STEP_UNIT for s in steps), device)


def _turn(x: Tensor) -> Tensor:
    """x [8, n]: points of Λ to points of E8 = D8 ∪ (D8 + ½), half as long in the square."""
    a, b = (x[:4] + x[4:]) / 2, (x[:4] - x[4:]) / 2
    b[0].neg_()
    return torch.cat([a, b])


def _turn_back(y: Tensor) -> Tensor:
    """The inverse of `_turn`; y is overwritten."""
    a, b = y[:4], y[4:]
    b[0].neg_()
    return torch.cat([a + b, a - b])
