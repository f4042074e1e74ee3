"""The product with very many tokens on an NVIDIA GPU: W in 16 bits, then PyTorch's product.

By ops/unrotate.cu in the model's basis; or, cheaper, by ops/dequantize.cu in the rotated one, for which x is rotated.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from glq import nvrtc
from glq.codecs import Codec, get_codec
from glq.codecs.packing import tile_rows
from glq.codecs.trellis import Trellis
from glq.ops.cuda_rotate import rotate_rows
from glq.ops.cuda_table import copies_in, decoder, device_table, macros, table_bytes
from glq.packed import PackedLinear
from glq.rotation import odd_part

_ROW_SHARE = 4  # from this share of the rows on there are enough tokens: measured on an H100
AT_ONCE = 1 << 26  # weights, 128 MiB of them


@dataclass(frozen=True)
class Plan:
    """What ops/dequantize.cu is compiled for: W in the rotated basis."""

    codec: Codec
    dtype: torch.dtype  # of W: fp16 or bf16
    scale: torch.dtype
    threads = 384

    @property
    def copies(self) -> int:
        return copies_in(self.codec, 64)

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block of threads."""
        return table_bytes(self.codec, self.copies)

    @cached_property
    def source(self) -> nvrtc.Source:
        return nvrtc.Source(
            (*decoder(self.codec), "ops/dequantize.cu"), macros(self.codec, self.copies, self.dtype, self.scale)
        )


@dataclass(frozen=True)
class UnrotatePlan:
    """What ops/unrotate.cu is compiled for: W in the model's basis."""

    codec: Trellis
    dtype: torch.dtype  # of W: fp16 or bf16; what comes before is fp16
    scale: torch.dtype
    block: int  # width of the rotation: a power of two from 64 to 2048
    copies: int  # of the table in shared memory
    buffers: int  # of values on their way from one pass to the other
    threads = 512

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block of threads."""
        return table_bytes(self.codec, self.copies) + self.buffers * 16 * 4 * (32 * 32 + 8)

    @cached_property
    def source(self) -> nvrtc.Source:
        own = {"OUT_BF16": int(self.dtype == torch.bfloat16), "BLOCK_TILES": self.block // 64, "BUFFERS": self.buffers}
        return nvrtc.Source(
            (*decoder(self.codec), "ops/unrotate.cu"), macros(self.codec, self.copies, torch.float16, self.scale, **own)
        )


_plan = lru_cache(4096)(Plan)  # which keeps its source


def unrotates(block: int) -> bool:
    """Whether ops/unrotate.cu knows rotations of that width."""
    return odd_part(block) == 1 and 64 <= block <= 2048


def own_basis_tokens(out_features: int) -> int:
    """From how many tokens on W is made in the model's basis, at a cost by rows; a rotation of x costs by tokens."""
    return -(-out_features // _ROW_SHARE)


def in_own_basis(codec: str, out_features: int, block: int, tokens: int) -> bool:
    """Whether W is made in the model's basis for so many tokens."""
    return isinstance(get_codec(codec), Trellis) and unrotates(block) and tokens >= own_basis_tokens(out_features)


@lru_cache(4096)
def make_plan(codec: Trellis, dtype: torch.dtype, scale: torch.dtype, block: int, gpu: nvrtc.Launcher) -> UnrotatePlan:
    """Two buffers and many copies of the table where there is room: on Hopper; one and four on consumer GPUs."""
    choices = [(64, 2), (64, 1), (32, 1)]
    plans = [UnrotatePlan(codec, dtype, scale, block, copies_in(codec, kb), buffers) for kb, buffers in choices]
    return next(p for p in plans if p.shared + nvrtc.RESERVED <= gpu.shared_memory)


def unrotate(weight: PackedLinear, dtype: torch.dtype, gpu: nvrtc.Launcher) -> Tensor:
    """W [out, in] of a trellis codec in `dtype`, as PackedLinear.dequantize."""
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    plan = make_plan(trellis, dtype, weight.scale.dtype, weight.block, gpu)
    row_tiles, col_tiles, _ = weight.codes.shape
    device, rows = weight.codes.device, weight.out_features
    out = torch.empty(rows, weight.in_features, dtype=dtype, device=device)
    grid = min(gpu.multiprocessors, 4 * row_tiles * -(-col_tiles // 32))
    tensors = (weight.codes, weight.signs, device_table(trellis, plan.copies, device, torch.float16), weight.scale, out)
    gpu.launch(plan.source, "unrotate", grid, plan.threads, plan.shared, *tensors, rows, col_tiles)
    return out


def decode_scaled(weight: PackedLinear, dtype: torch.dtype, gpu: nvrtc.Launcher) -> Tensor:
    """[64 · row tiles, 64 · column tiles] in `dtype`, scaled, in the rotated basis."""
    codec, rows = get_codec(weight.codec), weight.out_features
    plan = _plan(codec, dtype, weight.scale.dtype)
    row_tiles, col_tiles = -(-rows // 64), weight.codes.shape[1]
    device = weight.codes.device
    out = torch.empty(64 * row_tiles, 64 * col_tiles, dtype=dtype, device=device)
    grid = min(gpu.multiprocessors, -(-row_tiles * col_tiles * 32 // plan.threads))
    tensors = (weight.codes, device_table(codec, plan.copies, device, dtype), weight.scale, out)
    gpu.launch(plan.source, "dequantize", grid, plan.threads, plan.shared, *tensors, rows, row_tiles, col_tiles)
    return out


def matmul(x: Tensor, weight: PackedLinear, gpu: nvrtc.Launcher) -> Tensor:
    """As ops.matmul, for x [tokens, in] in fp16 or bf16."""
    (tokens, in_features), rows = x.shape, weight.out_features
    own_basis = in_own_basis(weight.codec, rows, weight.block, tokens)
    if not own_basis:
        x = rotate_rows(x, weight.signs, weight.block, gpu)
    step = max(1, AT_ONCE // in_features // 64) * 64
    if rows <= step:
        return linear(x, _matrix(weight, own_basis, x.dtype, gpu))
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    for first in range(0, rows, step):
        part = _rows(weight, first, min(first + step, rows))
        torch.mm(x, _matrix(part, own_basis, x.dtype, gpu).T, out=y[:, first : first + step])
    return y


def _matrix(weight: PackedLinear, own_basis: bool, dtype: torch.dtype, gpu: nvrtc.Launcher) -> Tensor:
    """[out, in], or as many columns as x has when it is rotated."""
    if own_basis:
        return unrotate(weight, dtype, gpu)
    w = decode_scaled(weight, dtype, gpu)
    return w if w.shape[0] == weight.out_features else w[: weight.out_features]


def _rows(weight: PackedLinear, first: int, end: int) -> PackedLinear:
    """Some rows, of which `first` begins a tile."""
    tall = tile_rows(get_codec(weight.codec).group)
    codes = weight.codes[first // tall : -(-end // tall)]
    scale = weight.scale[first:end]
    return PackedLinear(weight.codec, end - first, weight.in_features, weight.block, codes, scale, weight.signs)
