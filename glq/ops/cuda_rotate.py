"""The rotation of x on an NVIDIA GPU, into the order in which the kernels read it: launches ops/rotate.cu."""

import torch
from torch import Tensor

from glq import nvrtc
from glq.ops.inputs import PLAIN, Input, plain
from glq.rotation import hartley, odd_part

TILES, SWIZZLED, FRAGMENTS, _ROWS = range(4)  # macro LAYOUT: of decode.cu, prefill.cu, batch.cu; as x was
FEW = 256  # tokens
_TOGETHER = 8  # tokens of a block of threads at once, where there are more
_CHUNK = 256 * (4 * _TOGETHER + 2)  # bytes of shared memory for 256 columns of them, and their signs


def rotate_tiles(x: Input, signs: Tensor, block: int, held: int, layout: int, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] → [column tiles, held ≥ tokens, 72 (TILES) or 64]; rows beyond are not written."""
    tiles = x.first.new_empty(-(-x.shape[1] // 64), held, 72 if layout == TILES else 64)
    return _rotate(x, signs, block, tiles, held, layout, gpu)


def rotate_rows(x: Tensor, signs: Tensor, block: int, gpu: nvrtc.Launcher) -> Tensor:
    """x [tokens, in] fp16 or bf16 → [tokens, 64 · column tiles], filled up with zeros."""
    out = x.new_empty(len(x), -(-x.shape[1] // 64) * 64)
    return _rotate(plain(x), signs, block, out, len(x), _ROWS, gpu)


def _rotate(x: Input, signs: Tensor, block: int, out: Tensor, held: int, layout: int, gpu: nvrtc.Launcher) -> Tensor:
    tokens, in_features = x.shape
    chunks = block // 256 if by_warps(block) else 1
    macros = {"BF16": int(x.dtype == torch.bfloat16), "CHUNKS": chunks, "LAYOUT": layout, "INPUT": x.kind}
    source = nvrtc.Source(("ops/ptx.cuh", "ops/hadamard.cuh", "ops/input.cuh", "ops/rotate.cu"), tuple(macros.items()))
    blocks = in_features // block
    assert x.kind == PLAIN or makes(block, tokens)
    if by_warps(block) and tokens <= FEW:
        gpu.launch(
            source,
            "rotate_chunks",
            (tokens, blocks),
            32 * chunks,
            0,
            *x.tensors,
            signs,
            out,
            *x.sizes,
            held,
            in_features,
        )
    elif by_warps(block):
        groups, shared = -(-tokens // _TOGETHER), chunks * _CHUNK
        resident = max(1, min(16 // chunks, gpu.shared_memory // (shared + nvrtc.RESERVED)))  # on a multiprocessor
        turns = -(-groups // max(1, resident * gpu.multiprocessors // blocks))
        grid = (-(-groups // turns), blocks)
        gpu.launch(source, "rotate_many", grid, 32 * chunks, shared, x.first, signs, out, held, in_features, tokens)
    else:
        odd = odd_part(block)
        tensors = (x.first, signs, hartley(odd, torch.float32, x.device), out)
        sizes = (held, in_features, block, odd)
        gpu.launch(source, "rotate_tiles", (tokens, blocks), 256, 8 * block, *tensors, *sizes)
    return out


def makes(block: int, tokens: int) -> bool:
    """Whether a rotation makes an x that is not plain, too."""
    return by_warps(block) and tokens <= FEW


def by_warps(block: int) -> bool:
    """Whether warps divide a block of the rotation: they transform 256 columns each."""
    return block % 256 == 0 and block <= 2048
