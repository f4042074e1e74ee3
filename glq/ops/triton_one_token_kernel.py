"""The Triton kernel for one token: a product that needs no sum over programs.

A program has GROUP rows g of a row of tiles (rows 8·i + g for all i), over all columns: as many programs as fill a GPU
even where a matrix has few rows of tiles. Words are laid out [1, 1, n], in the order in which they lie in memory, so
that a thread loads up to 16 bytes at a time, keeps what it has loaded, and multiplies it by the pairs of x that lie in
the same order: nothing is exchanged between threads but the table, by tl.gather (triton_words.py).
"""

import triton
import triton.language as tl

from glq.ops.triton_nvidia import gdc_launch_dependents, gdc_wait
from glq.ops.triton_words import add_products, load_lanes_48, load_words, words_48


@triton.jit
def product_kernel(
    codes,
    x,
    table,
    scale,
    y,
    rows,
    col_tiles,
    FAMILY: tl.constexpr,
    CODE_BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ENTRIES: tl.constexpr,
    UNIT: tl.constexpr,
    GAIN: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
    PTX: tl.constexpr,
):
    """y[rows of the program] = scale · (x · Vᵀ), TILES of columns at a time.

    x u64: pairs of fp32, as rotate_to_words leaves them, with zeros up to a multiple of TILES. ENTRIES: of the table,
    or 0 where words look up single ones. UNIT: of the decoded values; the others are as in triton_words.py.
    EARLY: codes and table are read before x is waited for.
    """
    if EARLY:
        gdc_launch_dependents()
    PAIRS: tl.constexpr = 8 if FAMILY == "trellis" else 4
    N: tl.constexpr = TILES * GROUP * 32
    row_tile, first_g = tl.program_id(0) // (8 // GROUP), tl.program_id(0) % (8 // GROUP) * GROUP
    held = table
    if ENTRIES > 0:
        held = tl.load(table + tl.arange(0, ENTRIES))
    row_codes = codes + row_tile.to(tl.int64) * col_tiles * (8 * CODE_BITS)
    last = col_tiles - 1
    if CODE_BITS == 48:  # two words are three u32, so a thread has whole lanes, and halves of their words in turn
        n = tl.arange(0, N // 2)[None, None, :]
        tile = n // (16 * GROUP)
        x_at = x + (tile * 32 + n % 16)
        acc = tl.zeros((PAIRS, 1, N // 2), tl.float32)
        own0, own1, own2, next0, next1, next2 = load_lanes_48(row_codes, tile, last, n, first_g, GROUP)
        if EARLY:
            gdc_wait()
        for first in range(0, col_tiles, TILES):
            x0 = tl.load(tl.max_contiguous(x_at + first * 32, (1, 1, 4)))
            x1 = tl.load(tl.max_contiguous(x_at + (first * 32 + 16), (1, 1, 4)))
            words, after, words2, after2 = words_48(own0, own1, own2, next0, next1, next2)
            ahead = tile + (first + TILES)
            own0, own1, own2, next0, next1, next2 = load_lanes_48(row_codes, ahead, last, n, first_g, GROUP)
            acc = add_products(acc, words, after, held, x0, FAMILY, CODE_BITS, FIRST, SECOND, GAIN, PTX)
            acc = add_products(acc, words2, after2, held, x1, FAMILY, CODE_BITS, FIRST, SECOND, GAIN, PTX)
        acc = tl.reshape(acc, (PAIRS, TILES, GROUP, 16))
    else:
        n = tl.arange(0, N)[None, None, :]
        tile = n // (32 * GROUP)
        x_at = x + (tile * 32 + n // (4 * SIZE * GROUP) % (8 // SIZE) * (4 * SIZE) + n % (4 * SIZE))
        WIDTH: tl.constexpr = 2 if SIZE < 8 else 128 // CODE_BITS if CODE_BITS == 16 else 1
        acc = tl.zeros((PAIRS, 1, N), tl.float32)
        own, following = load_words(row_codes, tile, last, n, first_g, GROUP, SIZE, WIDTH, CODE_BITS, FAMILY)
        if EARLY:
            gdc_wait()
        for first in range(0, col_tiles, TILES):
            x0 = tl.load(tl.max_contiguous(x_at + first * 32, (1, 1, WIDTH)))
            words, after = own, following
            ahead = tile + (first + TILES)
            own, following = load_words(row_codes, ahead, last, n, first_g, GROUP, SIZE, WIDTH, CODE_BITS, FAMILY)
            acc = add_products(acc, words, after, held, x0, FAMILY, CODE_BITS, FIRST, SECOND, GAIN, PTX)
        acc = tl.reshape(acc, (PAIRS, TILES * (8 // SIZE), GROUP, 4 * SIZE))
    total = tl.sum(tl.sum(acc, 3), 1)
    row = (row_tile * PAIRS + tl.arange(0, PAIRS)[:, None]) * 8 + first_g + tl.arange(0, GROUP)[None, :]
    s = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + row, total * (s * UNIT), mask=row < rows)
