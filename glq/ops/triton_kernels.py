"""Triton kernels under triton_matmul.py: decoding with multiplication, sum of its parts, dequantization."""

import triton
import triton.language as tl

from glq.ops.triton_decode import decode_tile, load_table, load_words


@triton.jit
def multiply_kernel(
    codes,
    x,
    table,
    scale,
    y,
    partial,
    rows,
    cols,
    tokens,
    col_tiles,
    parts,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    CODE_BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One row of tiles, every `parts`-th of them, times the same columns of x; TOKENS ≥ tokens is at least 16.

    x [2, tokens, 32 · col_tiles] of DTYPE: the even columns, then the odd ones; what is beyond `cols` is not read.
    Writes y [tokens, rows] with the scales where it is the WHOLE sum, otherwise partial [parts, tokens, tile rows · row
    tiles] fp32 without them.
    """
    ROWS: tl.constexpr = 64 if FAMILY == "trellis" else 32
    row_tile, part = tl.program_id(0), tl.program_id(1)
    row_codes = codes + row_tile.to(tl.int64) * col_tiles * (8 * CODE_BITS)
    token = tl.arange(0, TOKENS)[None, :]
    odd_x = x + tokens * col_tiles * 32
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    held = load_table(table, FAMILY)
    words, following = load_words(row_codes + part * (8 * CODE_BITS), CODE_BITS, FAMILY)
    for tile in range(part, col_tiles, parts):
        # the next tile's codes are under way while this one is decoded
        ahead = tl.minimum(tile + parts, col_tiles - 1)
        next_words, next_following = load_words(row_codes + ahead * (8 * CODE_BITS), CODE_BITS, FAMILY)
        k = tile * 32 + tl.arange(0, 32)[:, None]
        at = token * (col_tiles * 32) + k
        x0 = tl.load(x + at, mask=(2 * k < cols) & (token < tokens), other=0.0)
        x1 = tl.load(odd_x + at, mask=(2 * k + 1 < cols) & (token < tokens), other=0.0)
        even, odd = decode_tile(words, following, held, CODE_BITS, FAMILY, FIRST, SECOND, DTYPE)
        acc = tl.dot(even, x0, acc, input_precision="ieee")
        acc = tl.dot(odd, x1, acc, input_precision="ieee")
        words, following = next_words, next_following
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    if WHOLE:
        s = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(y + token * rows + row, acc * s, mask=(row < rows) & (token < tokens))
    else:
        at = (part * tokens + token) * (tl.num_programs(0) * ROWS) + row
        tl.store(partial + at, acc, mask=token < tokens)


@triton.jit
def add_parts_kernel(partial, scale, y, rows, padded_rows, tokens, parts, ROWS: tl.constexpr):
    """y[token, rows] = scale · the sum of `parts` partial sums, in their order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + (part * tokens + token) * padded_rows + row, mask=inside, other=0.0)
    s = tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * rows + row, total * s, mask=inside)


@triton.jit
def dequantize_kernel(
    codes,
    table,
    scale,
    weight,
    rows,
    cols,
    col_tiles,
    CODE_BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One tile of weight [rows, cols], the decoded fp32 values times the scales, rounded once to weight's dtype."""
    ROWS: tl.constexpr = 64 if FAMILY == "trellis" else 32
    row_tile, col_tile = tl.program_id(0), tl.program_id(1)
    tile = codes + (row_tile.to(tl.int64) * col_tiles + col_tile) * (8 * CODE_BITS)
    words, following = load_words(tile, CODE_BITS, FAMILY)
    held = load_table(table, FAMILY)
    even, odd = decode_tile(words, following, held, CODE_BITS, FAMILY, FIRST, SECOND, tl.float32)
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    col = col_tile * 64 + tl.arange(0, 64)[None, :]
    s = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * cols + col
    tl.store(weight + at, tl.interleave(even * s, odd * s), mask=(row < rows) & (col < cols))
