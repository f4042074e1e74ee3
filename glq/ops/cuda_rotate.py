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
    odd = odd_part(block)
    macros = {"BF16": int(x.dtype == torch.bfloat16), "FOR_WGMMA": int(for_wgmma)}
    source = nvrtc.Source(("ops/ptx.cuh", "ops/rotate.cu"), tuple(macros.items()))
    tensors = (x.contiguous(), signs, hartley(odd, torch.float32, x.device), tiles)
    grid = (tokens, in_features // block)
    gpu.launch(source, "rotate_tiles", grid, 256, 8 * block, *tensors, held, in_features, block, odd)
    return tiles
