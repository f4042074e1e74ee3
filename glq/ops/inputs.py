"""What the x of a product is made of, for kernels that make it while they rotate it (ops/input.cuh)."""

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

PLAIN, SILU, NORM = range(3)  # macro INPUT


class Input(NamedTuple):
    """x [tokens, in] in fp16 or bf16: `first` itself, silu(first) · second, or the RMSNorm of first + second.

    Rows of first and second may lie apart, equally far. The sum that is normed goes to `total`.
    A named tuple, as one is made for every product, in a fifth of the time that a frozen dataclass takes.
    """

    kind: int
    first: Tensor
    second: Tensor
    weight: Tensor  # [in], of the norm
    total: Tensor
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    @property
    def tokens(self) -> int:
        return self.first.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As kernels take them."""
        return self.first, self.second, self.weight, self.total

    @property
    def sizes(self) -> tuple[int, int]:
        """eps as bits of fp32, and columns from one row to the next."""
        return _bits(self.eps), self.first.stride(0)

    def split(self, tokens: int) -> list["Input"]:
        """Of at most so many tokens each."""
        parts = zip(self.first.split(tokens), self.second.split(tokens), self.total.split(tokens), strict=True)
        return [Input(self.kind, first, second, self.weight, total, self.eps) for first, second, total in parts]


@lru_cache
def _bits(value: float) -> int:
    bits: int = struct.unpack("i", struct.pack("f", value))[0]
    return bits


def plain(x: Tensor) -> Input:
    x = _aligned(x)
    return Input(PLAIN, x, x, x, x, 0)


def silu_of(gate: Tensor, up: Tensor) -> Input:
    """silu(gate) · up, both [tokens, in]."""
    gate, up = _alike(gate, up)
    return Input(SILU, gate, up, gate, gate, 0)


def norm_of(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Input:
    """The RMSNorm of x + residual, both [tokens, in]; their sum goes to `total`."""
    x, residual = _alike(x, residual)
    return Input(NORM, x, residual, _aligned(weight), x.new_empty(x.shape), eps)


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows that begin at multiples of 16 bytes, equally far from each other."""
    fine = first.stride() == second.stride() and first.stride(1) == 1 and first.stride(0) % 8 == 0
    if fine and first.data_ptr() % 16 == second.data_ptr() % 16 == 0:
        return first, second
    return _aligned(first), _aligned(second)


def _aligned(x: Tensor) -> Tensor:
    return x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
