"""y = x · Wᵀ for a packed W with Triton: on any GPU that it compiles for, and on the CPU under its interpreter.

One token has a kernel of its own (triton_one_token.py). Up to `FEW` tokens the weights are decoded in registers and
multiplied there, every tile once for all tokens. More tokens are worth a matrix of decoded weights and PyTorch's own
product. Importing this module needs triton; nothing here waits for the GPU or reads from it, and what is kept (tables,
factors) is made at the first call, which must come before a CUDA graph is captured.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from glq.codecs import get_codec
from glq.codecs.packing import tile_rows
from glq.ops import triton_one_token
from glq.ops.triton_kernels import add_parts_kernel, dequantize_kernel, multiply_kernel
from glq.ops.triton_rotate import rotate, rotate_apart
from glq.ops.triton_tables import decoder, decoding_table, multiprocessors

FEW = 64  # tokens; accumulators of more would not fit in registers
_WARPS = 4
_STAGES = 1  # the kernel fetches codes ahead itself; Triton's pipeliner would put the tables' gathers in its queue, too
_PROGRAMS = 4  # wanted a multiprocessor, to hide the latency of loads
_SUM_ROWS = 256
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def matmul(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int) -> Tensor:
    """x [..., in] fp32, fp16 or bf16 → y [..., out] in x's dtype; the rest as in PackedLinear."""
    in_features = x.shape[-1]
    tokens = x.numel() // in_features
    with torch.cuda.device_of(x):
        if tokens > FEW:
            weight = dequantize(codes, scale, codec, out_features, in_features, x.dtype)
            return rotate(x, signs, block) @ weight.T
        flat = x.reshape(tokens, in_features).contiguous()
        y = x.new_empty(tokens, out_features)
        if tokens == 1:
            triton_one_token.matmul(flat[0], codes, scale, signs, codec, block, y[0])
        elif tokens:
            _multiply(rotate_apart(flat, signs, block, codes.shape[1]), codes, scale, codec, in_features, y)
    return y.view(*x.shape[:-1], out_features)


def dequantize(
    codes: Tensor, scale: Tensor, codec: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """diag(scale) · decode(codes), [out, in] in `dtype`: the weights in the rotated basis, rounded once from fp32."""
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    table = decoding_table(codec, torch.float32, codes.device)
    words = codes.contiguous().view(torch.uint32)
    row_tiles, col_tiles, _ = codes.shape
    with torch.cuda.device_of(codes):
        dequantize_kernel[(row_tiles, col_tiles)](
            words,
            table,
            scale,
            weight,
            out_features,
            in_features,
            col_tiles,
            **decoder(codec).constants,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return weight


def parts_of_a_row(row_tiles: int, col_tiles: int, tokens: int, processors: int) -> int:
    """Into how many sums each row of tiles is split: as many as fill the GPU, but every part has some tiles.

    With more tokens it must have more, or the partial sums would be more bytes than the codes.
    """
    wanted = math.ceil(_PROGRAMS * processors / row_tiles)
    return max(1, min(wanted, col_tiles // max(4, tokens // 4)))


def _multiply(
    x: Tensor, codes: Tensor, scale: Tensor, codec: str, in_features: int, y: Tensor, parts: int | None = None
) -> None:
    """x [2, tokens, 32 · column tiles], the rotated even columns and the odd ones → y [tokens, out], x's dtype."""
    tokens, out_features = y.shape
    row_tiles, col_tiles, _ = codes.shape
    parts = parts or parts_of_a_row(row_tiles, col_tiles, tokens, multiprocessors(x.device))
    padded_rows = row_tiles * tile_rows(get_codec(codec).group)
    partial = x.new_empty(parts, tokens, padded_rows, dtype=torch.float32) if parts > 1 else y
    multiply_kernel[(row_tiles, parts)](
        codes.contiguous().view(torch.uint32),
        x,
        decoding_table(codec, x.dtype, x.device),
        scale,
        y,
        partial,
        out_features,
        in_features,
        tokens,
        col_tiles,
        parts,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        WHOLE=parts == 1,
        DTYPE=TYPES[x.dtype],
        **decoder(codec).constants,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    if parts > 1:
        grid = (math.ceil(out_features / _SUM_ROWS), tokens)
        add_parts_kernel[grid](partial, scale, y, out_features, padded_rows, tokens, parts, ROWS=_SUM_ROWS)
