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
        rotated = self.rotation(x, signs)
        y = x.first.new_empty(self.sizes[0], self.sizes[2])
        tensors = (codes, rotated, self.table, scale, y, self.gpu.exchange(self.sums))
        self.gpu.launch(self.source, self.name, self.grid, self.threads, self.shared, *tensors, *self.sizes)
        return y
