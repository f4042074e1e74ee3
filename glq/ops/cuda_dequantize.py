"""The product with very many tokens on an NVIDIA GPU: W in 16 bits by ops/dequantize.cu, then PyTorch's product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import by_warps
from glq.ops.cuda_table import SCALES, device_table, index_bits, table_bytes, table_macros
from glq.packed import PackedLinear

MANY = 6144  # tokens from which this is faster than ops/prefill.cu; to be measured
_TABLE = 32 * 1024  # bytes of the table's copies
_AT_ONCE = 1 << 26  # weights, 128 MiB of them
_THREADS = 256


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    codec: Trellis
    dtype: torch.dtype  # of W: fp16 or bf16
    scale: torch.dtype
    block: int  # width of the rotation

    @property
    def _copies(self) -> int:
        return _TABLE // 4 >> index_bits(self.codec)

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block of threads."""
        return table_bytes(self.codec, self._copies) + 16 * (2 * self.block + 16)

    @property
    def source(self) -> nvrtc.Source:
        macros = {
            **table_macros(self.codec, self._copies),
            "BF16": int(self.dtype == torch.bfloat16),
            "SCALE": SCALES[self.scale],
            "TILES": self.block // 64,
        }
        files = ("ops/ptx.cuh", "ops/tiles.cuh", "ops/slices.cuh", "ops/dequantize.cu")
        return nvrtc.Source(files, tuple(macros.items()))


def applies(tokens: int, block: int) -> bool:
    """Whether this is the way to multiply so many tokens."""
    return tokens >= MANY and by_warps(block)


def dequantize(weight: PackedLinear, dtype: torch.dtype, gpu: nvrtc.Launcher) -> Tensor:
    """As weight.dequantize(), in `dtype`, for a trellis codec and by_warps(weight.block)."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    plan = Plan(trellis, dtype, weight.scale.dtype, weight.block)
    device, rows, cols = weight.codes.device, weight.out_features, weight.in_features
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    grid = min(2 * gpu.multiprocessors, -(-rows // 16) * (cols // weight.block))
    tensors = (weight.codes, weight.signs, device_table(trellis, device, dtype), weight.scale, out)
    gpu.launch(plan.source, "dequantize", grid, _THREADS, plan.shared, *tensors, rows, cols // 64)
    return out


def matmul(x: Tensor, weight: PackedLinear, gpu: nvrtc.Launcher) -> Tensor:
    """As ops.matmul, for what `dequantize` takes and x [tokens, in] in fp16 or bf16."""
    rows = weight.out_features
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    step = max(1, _AT_ONCE // weight.in_features // 64) * 64
    for first in range(0, rows, step):
        part = _rows(weight, first, min(first + step, rows))
        torch.mm(x, dequantize(part, x.dtype, gpu).T, out=y[:, first : first + step])
    return y


def _rows(weight: PackedLinear, first: int, end: int) -> PackedLinear:
    """Some rows, of which `first` begins a tile."""
    codes = weight.codes[first // 64 : -(-end // 64)]
    scale = weight.scale[first:end]
    return PackedLinear(weight.codec, end - first, weight.in_features, weight.block, codes, scale, weight.signs)
