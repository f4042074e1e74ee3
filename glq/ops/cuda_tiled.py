"""A product whose x is rotated by a launch ahead of it: what ops/batch.cu and ops/prompt.cu have in common."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glq import nvrtc
from glq.ops.cuda_rotate import FRAGMENTS, Rotation, rotation
from glq.ops.inputs import Input
from glq.ops.matrix import Matrix


@dataclass(frozen=True)
class Launch:
    """Of a kernel for one number of tokens, but for the tensors."""

    source: nvrtc.Source
    name: str
    grid: int | tuple[int, int]
    threads: int
    shared: int
    sums: int  # that blocks hand over
    sizes: tuple[int, ...]  # tokens, padded tokens, rows, …


@dataclass(frozen=True, eq=False)
class Product:
    """For matrices of one size and one number of tokens: all of its launches but the tensors."""

    rotation: Rotation
    table: Tensor
    launches: tuple[Launch, ...]  # each for some of the rows
    gpu: nvrtc.Launcher

    def __call__(self, x: Input, codes: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        """x [tokens, in] and the tensors of a PackedLinear → [tokens, out]."""
        tokens, _, rows, *_ = self.sizes
        y = x.first.new_empty(tokens, rows)
        self.put(y, x, codes, scale, signs)
        return y

    def beside(self, kind: int, dtype: torch.dtype, matrix: Matrix) -> "Product":
        """The same, whose x is rotated beside the product ahead of it (cuda_rotate.rotation)."""
        tokens, padded, *_ = self.sizes
        rotated = rotation(tokens, kind, dtype, matrix.cols, matrix.block, padded, FRAGMENTS, self.gpu, beside=True)
        return replace(self, rotation=rotated)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.launches[0].sizes

    def put(self, y: Tensor, x: Input, codes: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        """The same, to y. What was rotated, which launches that follow may still read."""
        rotated = self.rotation(x, signs)
        for one in self.launches:
            tensors = (codes, rotated, self.table, scale, y, self.gpu.exchange(one.sums))
            self.gpu.launch(one.source, one.name, one.grid, one.threads, one.shared, *tensors, *one.sizes)
        return rotated


@dataclass(frozen=True, eq=False)
class Parts:
    """A product by several, one after the other, of as many tokens each but for the last, which may have fewer."""

    products: tuple[Product, ...]

    def __call__(self, x: Input, codes: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        """x [tokens, in] and the tensors of a PackedLinear → [tokens, out]."""
        each, _, rows, *_ = self.products[0].sizes
        y = x.first.new_empty(x.tokens, rows)
        parts = zip(self.products, y.split(each), x.split(each), strict=True)
        # Kept, as a rotation would write over what the product beside it reads.
        rotated = [product.put(own, part, codes, scale, signs) for product, own, part in parts]
        del rotated
        return y
