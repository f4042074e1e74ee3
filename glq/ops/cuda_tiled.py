"""A product whose x is rotated by a launch ahead of it: what ops/batch.cu and ops/prompt.cu have in common."""

from dataclasses import dataclass

from torch import Tensor

from glq import nvrtc
from glq.ops.cuda_rotate import Rotation
from glq.ops.inputs import Input


@dataclass(frozen=True, eq=False)
class Product:
    """For matrices of one size and one number of tokens: all of its launches but the tensors."""

    rotation: Rotation
    table: Tensor
    source: nvrtc.Source
    name: str
    grid: int | tuple[int, int]
    threads: int
    shared: int
    sums: int  # that blocks hand over
    sizes: tuple[int, ...]  # tokens, padded tokens, rows, …
    gpu: nvrtc.Launcher

    def __call__(self, x: Input, codes: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        """x [tokens, in] and the tensors of a PackedLinear → [tokens, out]."""
        y = x.first.new_empty(self.sizes[0], self.sizes[2])
        self.put(y, x, codes, scale, signs)
        return y

    def put(self, y: Tensor, x: Input, codes: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        """The same, to y. What was rotated, which launches that follow may still read."""
        rotated = self.rotation(x, signs)
        tensors = (codes, rotated, self.table, scale, y, self.gpu.exchange(self.sums))
        self.gpu.launch(self.source, self.name, self.grid, self.threads, self.shared, *tensors, *self.sizes)
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
