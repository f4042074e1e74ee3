"""Second moments of what layers read: of one input, and of each expert's share of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glq.machine import tensor_cores

PRIOR = 0.5  # times its inputs: tokens that the average of a layer counts for in the moments of each expert
_ROWS = 1024  # of a matrix that are copied at once


@dataclass(frozen=True)
class Moments:
    """Of a group's input: hessian = E[x̂ x̂ᵀ] and drift = E[(x − x̂) x̂ᵀ], [in, in] fp32; x̂ is what it reads after the
    quantized prefix, x what it reads in the reference."""

    hessian: Tensor
    drift: Tensor
    largest: float = 0.0  # |x̂|

    @property
    def nbytes(self) -> int:
        return self.hessian.nbytes + self.drift.nbytes

    def to(self, device: torch.device) -> "Moments":
        return Moments(self.hessian.to(device), self.drift.to(device), self.largest)

    def mixed(self, other: "Moments", weight: float) -> "Moments":
        """With `weight` of the other's in it."""
        both = (self.hessian.lerp(other.hessian, weight), self.drift.lerp(other.drift, weight))
        return Moments(*both, self.largest)


class Sums:
    """The sums behind Moments; of the symmetric one, only the blocks on and above the diagonal: a third less work."""

    def __init__(self) -> None:
        self.count = 0
        self._ends: list[Tensor] = []
        self._upper: Tensor | None = None
        self._drift: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """x, x̂ [tokens, in] fp32."""
        n = x.shape[1]
        if self._upper is None or self._drift is None:
            self._upper, self._drift = x.new_zeros(n, n), x.new_zeros(n, n)
        self.count += x.shape[0]
        self._ends += torch.aminmax(x_hat)
        third = -(-n // 3)
        with tensor_cores():
            for start in range(0, n, third):
                rows = slice(start, start + third)
                self._upper[rows, start:].addmm_(x_hat[:, rows].T, x_hat[:, start:])
            self._drift.addmm_((x - x_hat).T, x_hat)

    def mean(self) -> Moments:
        """To be asked for once: the sums become the means."""
        if self._upper is None or self._drift is None:
            raise RuntimeError("no inputs were added")
        largest = torch.stack(self._ends).abs().max().item()
        return Moments(_whole(self._upper).div_(self.count), self._drift.div_(self.count), largest)


def _whole(upper: Tensor) -> Tensor:
    """A symmetric matrix from its blocks on and above the diagonal, in place."""
    for start in range(0, len(upper), _ROWS):
        rows = slice(start, start + _ROWS)
        upper[rows, :start] = upper[:start, rows].T
        square = upper[rows, rows]
        square.copy_(square.triu().add_(square.triu(1).T))
    return upper


def moments_of(inputs: Iterable[tuple[Tensor, ...]]) -> Moments:
    """Moments of inputs that come as pairs x, x̂ of [tokens, in]; or as x alone, where no model is quantized yet."""
    sums = Sums()
    for states in inputs:
        sums.add(states[0], states[-1])
    return sums.mean()


@dataclass(frozen=True)
class Routed:
    """What a linear layer of experts reads of one microbatch, and which of them read it, in both models.

    x, x_hat [tokens, in], or [tokens · k, in] where of_pairs: then a row belongs to one expert of a token alone.
    experts, experts_hat [tokens, k]. The two models may send a token to different experts: what the quantized one does
    counts, and where the reference's token did not come to an expert, that row has no drift.
    """

    x: Tensor
    experts: Tensor
    x_hat: Tensor
    experts_hat: Tensor
    of_pairs: bool

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """x, x̂ [tokens, in] of one expert."""
        tokens, slots = torch.where(self.experts_hat == expert)
        if not self.of_pairs:
            return self.x[tokens], self.x_hat[tokens]
        return self._matched(tokens, slots, self.experts[tokens] == expert)

    def of_all(self) -> tuple[Tensor, Tensor]:
        """x, x̂ of all pairs of a token and an expert; each token once where its experts read the same."""
        if not self.of_pairs:
            return self.x, self.x_hat
        tokens, slots = (index.flatten() for index in torch.where(torch.ones_like(self.experts_hat, dtype=torch.bool)))
        return self._matched(tokens, slots, self.experts[tokens] == self.experts_hat[tokens, slots][:, None])

    def _matched(self, tokens: Tensor, slots: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of pairs in the quantized model, and of the pair that is the same in the reference: same [pairs, k]."""
        k = self.experts.shape[1]
        x_hat = self.x_hat[tokens * k + slots]
        return torch.where(same.any(1)[:, None], self.x[tokens * k + same.int().argmax(1)], x_hat), x_hat


def expert_moments(inputs: Sequence[Routed], count: int) -> Iterator[tuple[int, Moments]]:
    """For each expert: how many tokens it reads, and the moments of these, with the layer's average mixed in.

    The average weighs as much as PRIOR · in tokens: an expert that reads few would have moments of noise, and one that
    reads none has the average alone.
    """
    average = moments_of(routed.of_all() for routed in inputs)
    for expert in range(count):
        sums = Sums()
        for routed in inputs:
            x, x_hat = routed.of(expert)
            if len(x):
                sums.add(x, x_hat)
        if sums.count == 0:
            yield 0, average
        else:
            prior = PRIOR * len(average.hessian)
            yield sums.count, sums.mean().mixed(average, prior / (prior + sums.count))
