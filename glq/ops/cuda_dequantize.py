"""The product with very many tokens on an NVIDIA GPU: W in 16 bits by ops/dequantize.cu, then PyTorch's product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import rotate_rows
from glq.ops.cuda_table import copies_in, device_table, macros, table_bytes
from glq.packed import PackedLinear

_TABLE = 64  # KB of the table's copies
_AT_ONCE = 1 << 26  # weights, 128 MiB of them
_THREADS = 384


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    codec: Trellis
    dtype: torch.dtype  # of W: fp16 or bf16
    scale: torch.dtype

    @property
    def _copies(self) -> int:
        return copies_in(self.codec, _TABLE)

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block of threads."""
        return table_bytes(self.codec, self._copies)

    @property
    def source(self) -> nvrtc.Source:
        files = ("ops/ptx.cuh", "ops/tiles.cuh", "ops/dequantize.cu")
        return nvrtc.Source(files, macros(self.codec, self._copies, self.dtype, self.scale))


def decode_scaled(weight: PackedLinear, dtype: torch.dtype, gpu: nvrtc.Launcher) -> Tensor:
    """[64 · row tiles, 64 · column tiles] of a trellis codec in `dtype`, scaled, in the rotated basis."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    plan = Plan(trellis, dtype, weight.scale.dtype)
    (row_tiles, col_tiles, _), rows = weight.codes.shape, weight.out_features
    device = weight.codes.device
    out = torch.empty(64 * row_tiles, 64 * col_tiles, dtype=dtype, device=device)
    grid = min(gpu.multiprocessors, -(-row_tiles * col_tiles * 32 // _THREADS))
    tensors = (weight.codes, device_table(trellis, device, dtype), weight.scale, out)
    gpu.launch(plan.source, "dequantize", grid, _THREADS, plan.shared, *tensors, rows, row_tiles, col_tiles)
    return out


def matmul(x: Tensor, weight: PackedLinear, gpu: nvrtc.Launcher) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in] in fp16 or bf16."""
    rows = weight.out_features
    rotated = rotate_rows(x, weight.signs, weight.block, gpu)
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    step = max(1, _AT_ONCE // rotated.shape[1] // 64) * 64
    for first in range(0, rows, step):
        part = _rows(weight, first, min(first + step, rows))
        w = decode_scaled(part, x.dtype, gpu)[: part.out_features]
        torch.mm(rotated, w.T, out=y[:, first : first + step])
    return y


def _rows(weight: PackedLinear, first: int, end: int) -> PackedLinear:
    """Some rows, of which `first` begins a tile."""
    codes = weight.codes[first // 64 : -(-end // 64)]
    scale = weight.scale[first:end]
    return PackedLinear(weight.codec, end - first, weight.in_features, weight.block, codes, scale, weight.signs)
