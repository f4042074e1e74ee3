"""Factored E8: 16 (or 12) bits for 8 weights, decoded from two half tables that fit in L1.

E8 is the union of four cosets of D4 ⊕ D4, so a point of a shifted E8 is a coset and, for each half of the vector, a
point of that coset of D4. Keeping the `entries` points nearest to 0 in each half coset gives a codebook of
4 · entries² words that decodes from a table of 4 · entries vectors of 4 (512 of them for 65,536 words), and whose
nearest word needs four coset-wise searches of a half table instead of one search of the whole codebook.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from glq.codecs.lattice import choose, flip_worst, nearest_integers

SHIFT = (0.25, 0.25, 0.25, 0.0)  # of each half; the best multiple of 1/4 (docs/decisions.md, "Shift of E8")
_COSETS = ((False, 0), (False, 1), (True, 0), (True, 1))  # (half-integers?, parity of the sum): four cosets of D4
_REACH = 6  # table points have coordinates inside (-_REACH, _REACH)
_CHUNK = 65536  # vectors at once: enough for two cores
_SEARCH = 1024  # of them at once in a search
_FEW = 1024  # vectors that a search is faster for: the closed form is many small operations


@dataclass(frozen=True)
class FactoredE8:
    """`code` = coset · entries² + first half's entry · entries + second half's entry."""

    name: str
    entries: int  # of each half coset; a power of two
    density: float  # lattice units to one standard deviation of the source
    mse: float  # on N(0, 1)
    group = 8

    @property
    def code_bits(self) -> int:
        return 2 + 2 * (self.entries.bit_length() - 1)

    @property
    def bits(self) -> float:
        return self.code_bits / self.group

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8] float → codes [...] int64 of the exactly nearest codewords (up to fp32 rounding)."""
        scaled = x.reshape(-1, 8).float() * self.density
        if x.device.type != "cpu" or scaled.shape[0] <= _FEW:
            return self._search(scaled).view(x.shape[:-1])  # no data-dependent shapes: safe in a CUDA graph
        return torch.cat([self._encode(part) for part in scaled.split(_CHUNK)]).view(x.shape[:-1])

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 8] float → codes [...] int64 and their values [..., 8] fp32."""
        codes = self.encode(x)
        return codes, self.decode(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] int → [..., 8] fp32."""
        table = half_table(self.entries, codes.device) / self.density
        codes = codes.long()
        rest = codes % self.entries**2
        coset = codes // self.entries**2 * self.entries
        halves = torch.stack([coset + rest // self.entries, coset + rest % self.entries], -1)
        return table[halves].flatten(-2)

    def _encode(self, x: Tensor) -> Tensor:
        """Closed form where the nearest point of the whole lattice is a codeword, a search elsewhere."""
        halves = (x.T.contiguous().view(2, 4, -1) - _shift(x.device)).unbind()
        nearest = [nearest_integers(h) for h in halves]
        costs = torch.zeros(2, 2, x.shape[0])  # [half-integers?, parity of each half, n]
        for _, distance, parity, flip in nearest:
            move = parity * flip
            costs[:, 0] += distance + move
            costs[:, 1] += distance + flip - move
        coset = _argmin(costs.view(4, -1), 0)
        is_half, is_odd = (coset // 2).float(), (coset % 2).float()
        entries = []
        for h, (point, _, parity, _) in zip(halves, nearest, strict=True):
            flip = (choose(is_half, parity) != is_odd).float()
            entries.append(_index_table(self.entries)[_grid_index(flip_worst(h, choose(is_half, point), flip))])
        codes = (coset * self.entries + entries[0]) * self.entries + entries[1]
        missed = ((entries[0] < 0) | (entries[1] < 0)).nonzero()[:, 0]
        if missed.numel():
            codes[missed] = torch.cat([self._search(part) for part in x[missed].split(_SEARCH)])
        return codes

    def nearest_in_cosets(self, x: Tensor) -> Tensor:
        """x [n, 8] float → [n, 4] int64: the code of the nearest codeword in each coset."""
        first, second = (d.argmin(-1) for d in self._distances(x.float() * self.density))
        coset = torch.arange(4, device=x.device)
        return (coset * self.entries + first) * self.entries + second

    def _search(self, x: Tensor) -> Tensor:
        """Nearest codeword by the distances to all half vectors; x [n, 8] in lattice units → [n]."""
        distances = self._distances(x)
        coset = _argmin(distances[0].amin(-1) + distances[1].amin(-1), 1)
        rows = torch.arange(x.shape[0], device=x.device) * 4 + coset
        first, second = (_argmin(d.view(-1, self.entries).index_select(0, rows), 1) for d in distances)
        return (coset * self.entries + first) * self.entries + second

    def _distances(self, x: Tensor) -> list[Tensor]:
        """For each half, [n, 4, entries]: half the squared distance to every entry, less what all have in common."""
        table = half_table(self.entries, x.device)
        energy = torch.cat([-table, table.square().sum(-1, keepdim=True) / 2], 1)
        halves = (torch.nn.functional.pad(h, (0, 1), value=1.0) for h in x.split(4, 1))
        return [(h @ energy.T).view(-1, 4, self.entries) for h in halves]


@dataclass(frozen=True)
class ResidualE8:
    """Two factored codes in one word: the second rounds what the first left, enlarged by 1 / gain."""

    name: str
    first: FactoredE8
    second: FactoredE8
    gain: float
    mse: float  # on N(0, 1)
    group = 8

    @property
    def code_bits(self) -> int:
        return self.first.code_bits + self.second.code_bits

    @property
    def bits(self) -> float:
        return self.code_bits / self.group

    def encode(self, x: Tensor) -> Tensor:
        """x [..., 8] float → codes [...] int64: the first stage's code in the low bits.

        The first stage's best word in each of its four cosets is tried: 0.4 dB better than the nearest one alone.
        """
        parts = x.reshape(-1, 8).split(_CHUNK // 4)
        return torch.cat([self._encode(part.float()) for part in parts]).view(x.shape[:-1])

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 8] float → codes [...] int64 and their values [..., 8] fp32."""
        codes = self.encode(x)
        return codes, self.decode(codes)

    def _encode(self, x: Tensor) -> Tensor:
        first = self.first.nearest_in_cosets(x)
        residual = (x[:, None] - self.first.decode(first)) / self.gain
        second = self.second.encode(residual.flatten(0, 1)).view_as(first)
        best = (residual - self.second.decode(second)).square().sum(-1).argmin(-1, keepdim=True)
        codes = first + second * 2**self.first.code_bits
        return codes.gather(1, best)[:, 0]

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] int → [..., 8] fp32."""
        codes = codes.long()
        size = 2**self.first.code_bits
        return self.first.decode(codes % size) + self.gain * self.second.decode(codes // size)


@cache
def half_table(entries: int, device: torch.device) -> Tensor:
    """[4 · entries, 4] fp32: each coset's `entries` points nearest to 0 after the shift, multiples of 1/4.

    Within a coset: by distance to 0, ties in lexicographic order of the coordinates. docs/FORMAT.md repeats this.
    """
    axis = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64)
    integers = torch.cartesian_prod(axis, axis, axis, axis)
    cosets = []
    for half, parity in _COSETS:
        points = integers + 0.5 if half else integers
        points = points[points.sum(1).remainder(2) == parity] + torch.tensor(SHIFT, dtype=torch.float64)
        nearest = points.square().sum(1).argsort(stable=True)[:entries]
        cosets.append(points[nearest])
    return torch.cat(cosets).to(device, torch.float32)


def _argmin(x: Tensor, dim: int) -> Tensor:
    """x.argmin(dim) for x [n, m] float, the first of equals; several times faster on a CPU."""
    index = torch.arange(x.shape[dim], device=x.device, dtype=x.dtype)
    if dim == 0:
        index = index[:, None]
    return (x != x.amin(dim, keepdim=True)).to(x.dtype).mul_(x.shape[dim]).add_(index).amin(dim).long()


@cache
def _shift(device: torch.device) -> Tensor:
    return torch.tensor(SHIFT, device=device)[:, None]


def _grid_index(point: Tensor) -> Tensor:
    """point [4, n] of integers or half-integers → [n] int64, distinct inside the reach; border cells hold no entry."""
    cell = (point.floor() + _REACH).clamp_(0, 2 * _REACH)
    size = 2 * _REACH + 1
    half = point[0] != point[0].floor()
    return ((((half * size + cell[0]) * size + cell[1]) * size + cell[2]) * size + cell[3]).long()


@cache
def _index_table(entries: int) -> Tensor:
    """Inverse of `half_table`: entry within its coset by `_grid_index`; a large negative number where there is none."""
    table = half_table(entries, torch.device("cpu"))
    points = table - torch.tensor(SHIFT)
    index = torch.full((2 * (2 * _REACH + 1) ** 4,), -(entries**3), dtype=torch.int64)
    index[_grid_index(points.T)] = torch.arange(table.shape[0]) % entries
    return index
