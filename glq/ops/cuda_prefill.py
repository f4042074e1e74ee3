"""The product with many tokens on a Hopper GPU: launches ops/prefill.cu, for trellis codecs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import rotate_tiles
from glq.ops.cuda_table import SCALES, device_table, table_bytes, table_macros
from glq.packed import PackedLinear

ARCH = 90  # the one that has these instructions
_ROWS = 256  # of a block
_THREADS = 256


@dataclass(frozen=True)
class Plan:
    """What a block of threads makes: 256 rows, for `tokens` tokens (64 or 128)."""

    codec: Trellis
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    tokens: int
    copies: int  # of the table in shared memory
    stages: int  # tiles of x on their way

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block."""
        ring = self.stages * self.tokens * 128
        return max(ring + table_bytes(self.codec, self.copies), 2 * self.tokens * (_ROWS + 8))

    @property
    def source(self) -> nvrtc.Source:
        macros = {
            **table_macros(self.codec, self.copies),
            "BF16": int(self.dtype == torch.bfloat16),
            "SCALE": SCALES[self.scale],
            "TOKENS": self.tokens,
            "STAGES": self.stages,
        }
        files = ("ops/ptx.cuh", "ops/tiles.cuh", "ops/wgmma.cuh", "ops/prefill.cu")
        return nvrtc.Source(files, tuple(macros.items()), of_one_arch=True)


def make_plan(
    codec: Trellis, dtype: torch.dtype, scale: torch.dtype, tokens: int, out_features: int, multiprocessors: int
) -> Plan:
    """Blocks of 128 tokens, unless that leaves half of the GPU idle."""
    blocks = -(-tokens // 128) * -(-out_features // _ROWS)
    copies = {8: 32, 9: 32, 10: 16, 11: 16}[codec.table_bits]
    if tokens <= 64 or 2 * blocks <= multiprocessors:
        return Plan(codec, dtype, scale, 64, copies, 8)
    return Plan(codec, dtype, scale, 128, copies, 4)


def matmul(x: Tensor, weight: PackedLinear, gpu: nvrtc.Launcher, plan: Plan | None = None) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in] in fp16 or bf16, on a GPU whose arch is ARCH."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    tokens = x.shape[0]
    plan = plan or make_plan(trellis, x.dtype, weight.scale.dtype, tokens, weight.out_features, gpu.multiprocessors)
    row_tiles, col_tiles, _ = weight.codes.shape
    grid = (-(-tokens // plan.tokens), -(-weight.out_features // _ROWS))
    padded = grid[0] * plan.tokens
    tiles = rotate_tiles(x, weight.signs, weight.block, padded, True, gpu)
    y = torch.empty(tokens, weight.out_features, dtype=x.dtype, device=x.device)
    tensors = (weight.codes, tiles, device_table(trellis, x.device, x.dtype), weight.scale, y)
    sizes = (tokens, padded, weight.out_features, row_tiles, col_tiles)
    gpu.launch(plan.source, "prefill", grid, _THREADS, plan.shared, *tensors, *sizes)
    return y
