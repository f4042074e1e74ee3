"""The product with few tokens on an NVIDIA GPU: launches ops/decode.cu, for trellis codes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.errors import GlqError
from glq.ops.cuda_rotate import by_warps, rotate_tiles
from glq.ops.cuda_table import SCALES, device_table, table_bytes, table_macros
from glq.packed import PackedLinear

_SHARED = 99 * 1024  # bytes of shared memory that every GPU from sm_80 on gives a block


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the GPU."""

    codec: Trellis
    dtype: torch.dtype  # of x: fp16 or bf16
    scale: torch.dtype
    tokens: int
    wr: int  # row tiles of a unit
    wk: int  # column tiles of a unit
    copies: int  # of the table in shared memory
    block: int  # width of the rotation, in the kernel; 0: x comes rotated
    blocks: int  # of threads, a multiprocessor
    ahead: int = 1  # tiles whose codes are requested ahead
    resident: int = 1  # blocks for which a multiprocessor has registers

    @property
    def token_tiles(self) -> int:
        return -(-self.tokens // 8)

    @property
    def held(self) -> int:
        """Tokens in a tile of x."""
        return self.tokens if self.token_tiles == 1 else 8 * self.token_tiles

    @property
    def threads(self) -> int:
        return 32 * self.wr * self.wk

    def shared(self, cols: int) -> int:
        """Bytes of shared memory a block."""
        warps = self.wr * self.wk
        scratch = 256 * warps if self.block else 0
        sums = max(68 * min(self.tokens, 8) * warps, scratch)
        x = 2 * cols if self.block else 2 * 2 * self.wk * self.held * 72
        return table_bytes(self.codec, self.copies) + 4 * sums + x

    @property
    def source(self) -> nvrtc.Source:
        macros = {
            **table_macros(self.codec, self.copies),
            "NT": self.token_tiles,
            "WR": self.wr,
            "WK": self.wk,
            "BF16": int(self.dtype == torch.bfloat16),
            "SCALE": SCALES[self.scale],
            "BLOCK": self.block,
            "AHEAD": self.ahead,
            "RESIDENT": self.resident,
        }
        return nvrtc.Source(
            ("ops/ptx.cuh", "ops/hadamard.cuh", "ops/tiles.cuh", "ops/decode.cu"), tuple(macros.items())
        )


def max_tokens(arch: int) -> int:
    """Of a launch: the assembler for Blackwell runs out of registers beyond 32."""
    return 64 if arch < 100 else 32


def make_plan(
    codec: Trellis, dtype: torch.dtype, scale: torch.dtype, tokens: int, in_features: int, block: int
) -> Plan:
    """One token is rotated in the kernel, where warps divide its blocks; more of them in a launch of their own."""
    copies = {8: 32, 9: 16, 10: 8, 11: 8}[codec.table_bits]
    if tokens == 1 and by_warps(block):
        plan = Plan(codec, dtype, scale, 1, 2, 4, copies, block, 2)
        if plan.shared(in_features) <= _SHARED:
            return plan
    return Plan(codec, dtype, scale, tokens, 8, 1, copies, 0, 2 if tokens <= 16 else 1)


def matmul(x: Tensor, weight: PackedLinear, gpu: nvrtc.Launcher, plan: Plan | None = None) -> Tensor:
    """As ops.matmul, for a trellis codec and x [tokens, in] in fp16 or bf16 with 1 to max_tokens(gpu.arch) tokens."""
    tokens, in_features = x.shape
    trellis = get_codec(weight.codec)
    assert isinstance(trellis, Trellis)
    plan = plan or make_plan(trellis, x.dtype, weight.scale.dtype, tokens, in_features, weight.block)
    row_tiles, col_tiles, _ = weight.codes.shape
    units = -(-row_tiles // plan.wr) * -(-col_tiles // plan.wk)
    grid = min(units, plan.blocks * gpu.multiprocessors)
    x = x.contiguous()
    if not plan.block:
        x = rotate_tiles(x, weight.signs, weight.block, plan.held, False, gpu)
    y = torch.empty(tokens, weight.out_features, dtype=x.dtype, device=x.device)
    sums = grid * plan.wr * 64 * tokens
    own = torch.empty(sums, dtype=torch.float32, device=x.device)
    table = device_table(trellis, x.device, x.dtype)
    tensors = (weight.codes, x, weight.signs, table, weight.scale, y, gpu.exchange(sums), own)
    sizes = (tokens, weight.out_features, in_features, row_tiles, col_tiles, units // grid, units % grid)
    gpu.launch(plan.source, "decode", grid, plan.threads, plan.shared(64 * col_tiles), *tensors, *sizes)
    return y


def try_out(gpu: nvrtc.Launcher, device: torch.device) -> None:
    """Compile, run and check a small product. GlqError if it is wrong; what CUDA raises if there is none."""
    name, size = "trellis-2", 64
    codes = torch.arange(256, dtype=torch.uint8).repeat(4).view(1, 1, -1)
    signs, scale = torch.full((size // 8,), 0x5A, dtype=torch.uint8), torch.linspace(0.5, 2, size).half()
    x = torch.linspace(-1, 1, size).half()[None]
    weight = PackedLinear(name, size, size, size, codes, scale, signs)
    expected = x.float() @ weight.dequantize().T
    on_device = replace(weight, codes=codes.to(device), scale=scale.to(device), signs=signs.to(device))
    y = matmul(x.to(device), on_device, gpu)
    if not torch.allclose(y.float().cpu(), expected, rtol=0.01, atol=0.01 * expected.abs().max().item()):
        raise GlqError("the CUDA kernel computes something else than PyTorch on this GPU")
