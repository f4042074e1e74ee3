"""Triton kernels that rotate x: blocks of any width as products of matrices, powers of two by sums and differences.

They may leave the columns in the order of words (triton_words.py): word j of t, for a pair of columns each, at
(j // SIZE, t, j % SIZE). With a SIZE of 8 that is the order of columns.
"""

import triton
import triton.language as tl

from glq.ops.triton_nvidia import gdc_launch_dependents, gdc_wait


@triton.jit
def rotate_kernel(
    x,
    signs,
    left,
    right,
    y,
    cols,
    token_stride,
    parity_stride,
    pair_stride,
    A: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """16 rows of one block of one token, as a matrix X [A, P]: left · X · right, in fp32.

    left [A, A] and right [P, P] are padded with zeros to multiples of 16. Column c of token t goes to
    y[t · token_stride + c % 2 · parity_stride + place of pair c // 2 · pair_stride].
    """
    A_PAD: tl.constexpr = (A + 15) // 16 * 16
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.program_id(2) * 16 + tl.arange(0, 16)[:, None]
    p = tl.arange(0, P_PAD)[None, :]
    product = tl.zeros((16, P_PAD), tl.float32)
    for start in range(0, A_PAD, 16):
        a = start + tl.arange(0, 16)
        inside = (a[:, None] < A) & (p < P)
        col = (block * A + a[:, None]) * P + p
        minus = (tl.load(signs + col // 8, mask=inside, other=0).to(tl.int32) >> (col % 8)) & 1
        v = tl.load(x + token * cols + col, mask=inside, other=0.0).to(tl.float32) * (1 - 2 * minus).to(tl.float32)
        factor = tl.load(left + row * A_PAD + a[None, :])
        product = tl.dot(factor, v, product, input_precision="ieee")
    factor = tl.load(right + tl.arange(0, P_PAD)[:, None] * P_PAD + p)
    product = tl.dot(product, factor, input_precision="ieee")
    col = (block * A + row) * P + p
    at = token * token_stride + (col % 2) * parity_stride + _place(col // 2, SIZE) * pair_stride
    tl.store(y + at, product, mask=(row < A) & (p < P))


@triton.jit
def rotate_power_kernel(
    x,
    signs,
    y,
    cols,
    padded,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PAD: tl.constexpr,
    SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One block, 2^LEVELS wide, of one token; y [padded] fp32, with zeros from `cols` on.

    EARLY: it waits first, and then lets the product start, which so may read codes before it waits itself.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    minus = (tl.load(signs + col // 8).to(tl.int32) >> (col % 8)) & 1
    v = tl.load(x + col).to(tl.float32)
    v = tl.where(minus == 1, -v, v)
    for _ in tl.static_range(LEVELS):  # the lowest bit of the index becomes the highest
        a, b = tl.split(tl.reshape(v, (BLOCK // 2, 2)))
        v = tl.reshape(tl.trans(tl.join(a + b, a - b)), (BLOCK,))
    tl.store(y + _place(col // 2, SIZE) * 2 + col % 2, v * (1.0 / BLOCK**0.5))
    if PAD > 0:
        rest = cols + tl.arange(0, PAD)
        tl.store(y + _place(rest // 2, SIZE) * 2 + rest % 2, tl.zeros((PAD,), tl.float32), mask=rest < padded)


@triton.jit
def _place(pair, SIZE: tl.constexpr):
    """Where a pair of columns lies in the order of words."""
    place = pair
    if SIZE < 8:
        t, j = pair // 8 % 4, pair % 8
        place = pair // 32 * 32 + j // SIZE * (4 * SIZE) + t * SIZE + j % SIZE
    return place
