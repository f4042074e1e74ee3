"""The Triton kernel that rotates x, by products of matrices."""

import triton
import triton.language as tl


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
):
    """16 rows of one block of one token, as a matrix X [A, P]: left · X · right, in fp32.

    left [A, A] and right [P, P] are padded with zeros to multiples of 16. Column c of token t goes to
    y[t · token_stride + c % 2 · parity_stride + c // 2 · pair_stride].
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
    at = token * token_stride + (col % 2) * parity_stride + col // 2 * pair_stride
    tl.store(y + at, product, mask=(row < A) & (p < P))
