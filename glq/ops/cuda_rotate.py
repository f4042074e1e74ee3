"""The rotation of x on an NVIDIA GPU, into the order in which the kernels read it: launches ops/rotate.cu."""

import torch
from torch import Tensor

from glq import nvrtc
from glq.rotation import hartley, odd_part


def rotate_tiles(x: Tensor, signs: Tensor, block: int, held: int, for_wgmma: bool, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] fp16 or bf16 → [column tiles, held ≥ tokens, 72 or 64]; rows beyond the tokens are not written."""
    tokens, in_features = x.shape
    col_tiles = -(-in_features // 64)
    tiles = torch.empty(col_tiles, held, 64 if for_wgmma else 72, dtype=x.dtype, device=x.device)
    chunks = block // 256 if by_warps(block) else 1
    macros = {"BF16": int(x.dtype == torch.bfloat16), "CHUNKS": chunks, "FOR_WGMMA": int(for_wgmma)}
    source = nvrtc.Source(("ops/ptx.cuh", "ops/hadamard.cuh", "ops/rotate.cu"), tuple(macros.items()))
    grid, x, odd = (tokens, in_features // block), x.contiguous(), odd_part(block)
    if by_warps(block):
        gpu.launch(source, "rotate_chunks", grid, 32 * chunks, 0, x, signs, tiles, held, in_features)
    else:
        tensors = (x, signs, hartley(odd, torch.float32, x.device), tiles)
        gpu.launch(source, "rotate_tiles", grid, 256, 8 * block, *tensors, held, in_features, block, odd)
    return tiles


def by_warps(block: int) -> bool:
    """Whether warps divide a block of the rotation: they transform 256 columns each."""
    return odd_part(block) == 1 and 256 <= block <= 2048
