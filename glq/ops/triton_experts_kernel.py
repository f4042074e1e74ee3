"""The Triton kernel under triton_experts.py: decoding and multiplication for pairs of a token and an expert."""

import triton
import triton.language as tl

from glq.ops.triton_decode import decode_tile, load_table, load_words


@triton.jit
def experts_kernel(
    codes,
    x,
    odd_x,
    table,
    scale,
    y,
    order,
    by_expert,
    rows,
    cols,
    experts,
    row_tiles,
    col_tiles,
    top_k,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DTYPE: tl.constexpr,
    CODE_BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """One row of tiles of one expert, for up to PAIRS of its pairs: 1, or at least 16.

    x, odd_x [tokens, 32 · col_tiles]: as in multiply_kernel. PAIRS of 1: program s has pair s, whose expert is
    by_expert[s]. Otherwise it has the s-th segment of the order, in which expert e's pairs end at by_expert[e];
    EXPERTS ≥ experts is a power of two. Pairs without an expert keep the row of y that they have.
    """
    ROWS: tl.constexpr = 64 if FAMILY == "trellis" else 32
    row_tile, s = tl.program_id(0), tl.program_id(1)
    slot = tl.arange(0, PAIRS)[None, :]
    if PAIRS == 1:
        expert = tl.load(by_expert + s).to(tl.int64)
        pair = slot + s
        inside = slot < 1
    else:
        e = tl.arange(0, EXPERTS)
        end = tl.load(by_expert + e, mask=e < experts, other=0)
        begin = tl.load(by_expert + e - 1, mask=(e > 0) & (e < experts), other=0)
        own = tl.where(e < experts, (end - begin + PAIRS - 1) // PAIRS, 0)
        past = tl.cumsum(own, 0)
        expert = tl.sum((past <= s).to(tl.int32)).to(tl.int64)
        first = tl.sum(tl.where(e == expert, begin + (s - past + own) * PAIRS, 0))
        last = tl.sum(tl.where(e == expert, end, 0))
        inside = first + slot < last
        pair = tl.load(order + first + slot, mask=inside, other=0)
    if (expert >= 0) & (expert < experts):
        row_codes = codes + (expert * row_tiles + row_tile) * col_tiles * (8 * CODE_BITS)
        x_row = (pair // top_k).to(tl.int64) * (col_tiles * 32)
        acc = tl.zeros((ROWS, 32 if PAIRS == 1 else PAIRS), tl.float32)
        held = load_table(table, FAMILY)
        for tile in range(0, col_tiles):
            words, following = load_words(row_codes + tile * (8 * CODE_BITS), CODE_BITS, FAMILY)
            even, odd = decode_tile(words, following, held, CODE_BITS, FAMILY, FIRST, SECOND, DTYPE)
            if PAIRS == 1:
                k = tile * 32 + tl.arange(0, 32)[None, :]
                x0 = tl.load(x + x_row + k, mask=2 * k < cols, other=0.0).to(tl.float32)
                x1 = tl.load(odd_x + x_row + k, mask=2 * k + 1 < cols, other=0.0).to(tl.float32)
                acc += even * x0
                acc += odd * x1
            else:
                k = tile * 32 + tl.arange(0, 32)[:, None]
                x0 = tl.load(x + x_row + k, mask=(2 * k < cols) & inside, other=0.0)
                x1 = tl.load(odd_x + x_row + k, mask=(2 * k + 1 < cols) & inside, other=0.0)
                acc = tl.dot(even, x0, acc, input_precision="ieee")
                acc = tl.dot(odd, x1, acc, input_precision="ieee")
        if PAIRS == 1:
            acc = tl.sum(acc, 1)[:, None]
        row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
        factor = tl.load(scale + expert * rows + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(y + pair.to(tl.int64) * rows + row, acc * factor, mask=(row < rows) & inside)
