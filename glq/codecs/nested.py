"""Nested E8: a Voronoi code of the E8 lattice with one of a few scales a vector (NestQuant, arXiv:2502.09720).

Eight weights become the point of β·(E8 + s) nearest to them, s = (½, 0, …, 0), kept modulo q·E8: q⁸ codewords, those
in the Voronoi region of q·E8. β is the one of `scales` that loses least: small ones resolve the bulk, large ones reach
the tails. They are fitted to real rotated weights, not to a Gaussian alone (docs/decisions.md, "Scales of nested E8").
Encoding and decoding are closed forms; decoding is integers only, up to one product with β/2, so that every
implementation agrees to the bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq.codecs.lattice import choose, constant, nearest_e8

_CHUNK = 32768  # columns at once: enough for two cores, little enough for their caches
_ORDER = tuple(float(i) for i in range(8))


@dataclass(frozen=True)
class NestedE8:
    """Digits c₀…c₇ below q and the index of β in one word, lowest bits first:

    eight low digits c mod low, log2(low) bits each (low is the power of two in q); then, where q is three times
    that, the eight high digits c // low as one 13-bit number in base 3; then the index of β.
    """

    name: str
    q: int  # a power of two, or three times one
    code_bits: int
    scales: tuple[float, ...]  # β, increasing
    mse: float  # on N(0, 1)
    group = 8

    @property
    def bits(self) -> float:
        return self.code_bits / self.group

    @property
    def low(self) -> int:
        return self.q & -self.q

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8] float → codes [...] int64."""
        return self.round(x)[0]

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 8] float → codes [...] int64 and their values [..., 8] fp32.

        A vector beyond every scale's reach is clamped, never wrapped.
        """
        flat = x.reshape(-1, 8)
        size = _CHUNK // (len(self.scales) + 1) if x.device.type == "cpu" else max(flat.shape[0], 1)
        parts = [self._round(part.T.float().contiguous()) for part in flat.split(size)]
        codes, values = parts[0] if len(parts) == 1 else (torch.cat(p, -1) for p in zip(*parts, strict=True))
        return codes.view(x.shape[:-1]), values.T.reshape(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] int → [..., 8] fp32."""
        flat = codes.reshape(-1)
        parts = [self._decode(part).T for part in flat.split(_CHUNK if codes.device.type == "cpu" else 2**20)]
        return torch.cat(parts).reshape(*codes.shape, 8)

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [8, n] fp32 → codes [n] int64, values [8, n]: every scale is tried, the largest one twice.

        The second time on the vector pulled inside its reach: a vector of norm q/√2 - 1 rounds to a point inside the
        Voronoi region (inradius less covering radius).
        """
        n = x.shape[1]
        beta = constant((*self.scales, self.scales[-1]), x.device)[:, None]
        reach = self.scales[-1] * (self.q / 2**0.5 - 1)
        t = x[:, None] / beta
        t[:, -1] *= (reach / x.square().sum(0).sqrt_().clamp_min_(1e-30)).clamp_max_(1.0)
        t[0] -= 0.5  # s
        digits = self._digits(nearest_e8(t.view(8, -1)).mul_(2))
        values = self._shortest(self._doubled_point(digits)).view(8, -1, n) * (beta / 2)
        choice = (x[:, None] - values).square_().sum(0).argmin(0, keepdim=True)
        pick = choice.expand(8, 1, n)
        digits = digits.view(8, -1, n).gather(1, pick)[:, 0]
        scale = choice[0].clamp_max(len(self.scales) - 1)
        return self._pack(digits.long(), scale), values.gather(1, pick)[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        """codes [n] → [8, n] fp32."""
        digits, scale = self._unpack(codes.long())
        beta = constant(self.scales, codes.device)
        return self._shortest(self._doubled_point(digits.float())) * (beta / 2)[scale]

    def _digits(self, y: Tensor) -> Tensor:
        """y [8, n] fp32, twice a point of E8 → its coordinates in the basis e₀+e₆, …, e₅+e₆, 2e₆, (½, …, ½), mod q."""
        c = y - y[7]
        c[:6] /= 2
        c[6] = (c[6] - 2 * c[:6].sum(0)) / 4
        c[7] = y[7]
        return c.remainder_(self.q)

    @staticmethod
    def _doubled_point(c: Tensor) -> Tensor:
        """The inverse of `_digits`, up to 2q·E8, plus 2s: c [8, n] fp32 → [8, n]."""
        y = 2 * c + c[7]
        y[6] += 2 * c[:6].sum(0) + 2 * c[6]
        y[7] = c[7]
        y[0] += 1
        return y

    def _shortest(self, y: Tensor) -> Tensor:
        """The shortest vector of y + 2q·E8 for each column of y [8, n], integers held in fp32 (exact).

        Ties: halves round up, the first of equally bad coordinates flips, the integer coset wins.
        """
        period = 2.0 * self.q
        d = y[:, None] - constant((0.0, float(self.q)), y.device)[:, None]
        r = ((d + self.q) / period).floor_()
        d.sub_(r, alpha=period)
        odd = r.sum(0).remainder_(2)
        size = d.abs()
        norm = d.square().sum(0).addcmul_(odd, period - 2 * size.amax(0), value=period)
        half = (norm[1] < norm[0]).float()
        d, odd = choose(half, d), choose(half, odd)
        size = d.abs()
        rank = size.mul_(8).sub_(constant(_ORDER, y.device)[:, None])  # unique: the first of equals is the largest
        worst = (rank == rank.amax(0)).float()
        return d.addcmul_(worst.copysign_(d), odd, value=-period)

    def _pack(self, digits: Tensor, scale: Tensor) -> Tensor:
        """digits [8, n] int64 below q and the index of β [n] → codes [n]."""
        i = torch.arange(8, device=digits.device)[:, None]
        place = 1 << i * self._low_bits
        code = scale << self._scale_bit
        if self.q == self.low:
            return code + (digits * place).sum(0)
        high = digits // self.low
        return code + (digits * place + high * ((3**i << 8 * self._low_bits) - self.low * place)).sum(0)

    def _unpack(self, code: Tensor) -> tuple[Tensor, Tensor]:
        i = torch.arange(8, device=code.device)[:, None]
        digits = code >> i * self._low_bits & self.low - 1
        if self.q != self.low:
            digits += (code >> 8 * self._low_bits & 0x1FFF) // 3**i % 3 * self.low
        return digits, code >> self._scale_bit

    @property
    def _low_bits(self) -> int:
        return self.low.bit_length() - 1

    @property
    def _scale_bit(self) -> int:
        return 8 * self._low_bits + (13 if self.q != self.low else 0)
