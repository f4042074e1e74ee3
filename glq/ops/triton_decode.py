"""Triton functions that turn one tile of codes into two register tiles, its even and its odd columns.

docs/FORMAT.md says what the codes mean. Tensors are laid out [i, g, c]: a lane's word of row g and columns 2c, 2c + 1
gives the pairs of rows 8·i + g. With i the slowest axis a thread holds all pairs of a word, so that what the word costs
(loads, sums over its weights) is paid once for them all, and shifts by multiples of i are constants. Words have a first
axis of 1 for i; what comes after it may be of another shape (triton_words.py).

Every family has one table (triton_tables.py) and two numbers FIRST and SECOND:
    trellis   how many of a pair's signs the table has, 0
    e8        log₂ of a half coset's entries in the first stage and in the second (0 if there is none)
    nested    q, bits of a low digit
"""

import triton
import triton.language as tl

from glq.codecs import trellis

_MULTIPLIER = tl.constexpr(trellis.MULTIPLIER)
_LOOK_UPS = tl.constexpr(trellis.LOOK_UPS)


@triton.jit
def load_table(table, FAMILY: tl.constexpr):
    """What decode_tile takes as its table: a trellis' entries, otherwise the pointer."""
    held = table
    if FAMILY == "trellis":
        held = tl.load(table + tl.arange(0, _LOOK_UPS))
    return held


@triton.jit
def load_words(tile, CODE_BITS: tl.constexpr, FAMILY: tl.constexpr):
    """tile: u32 pointer → the words [1, 8, 32] of a tile, and for a trellis the next ones, as lane_words has them.

    Element [0, g, c] is word c % 8 of lane 4·g + c // 8.
    """
    lane = tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, 32)[None, None, :] // 8
    return lane_words(tile, lane, tl.arange(0, 32)[None, None, :] % 8, CODE_BITS, FAMILY)


@triton.jit
def lane_words(tile, lane, j, CODE_BITS: tl.constexpr, FAMILY: tl.constexpr):
    """Words j of lanes, u64, and for a trellis at least 16 bits of the next ones of their strips, u32.

    Other families get their words twice.
    """
    words = _word_bits(tile, lane, j, CODE_BITS, CODE_BITS)
    if CODE_BITS < 64:
        words = words & ((1 << CODE_BITS) - 1)
    following = words.to(tl.uint32)
    if FAMILY == "trellis":
        following = _word_bits(tile, (lane + 4) % 32, j, CODE_BITS, 16).to(tl.uint32)
    return words, following


@triton.jit
def _word_bits(tile, lane, j, CODE_BITS: tl.constexpr, COUNT: tl.constexpr):
    """u64 whose lowest COUNT bits are the first ones of word j of a lane; the others are arbitrary."""
    bit = CODE_BITS * j
    GRAIN: tl.constexpr = (CODE_BITS | 32) & -(CODE_BITS | 32)  # divides bit % 32, which is at most 32 - GRAIN
    q, shift = bit // 32, (bit % 32).to(tl.uint64)
    bits = _payload(tile, lane, q, CODE_BITS).to(tl.uint64)
    if 32 - GRAIN + COUNT > 32:
        bits = bits | (_payload(tile, lane, q + 1, CODE_BITS).to(tl.uint64) << 32)
    bits = bits >> shift
    if 32 - GRAIN + COUNT > 64:
        rest = _payload(tile, lane, q + 2, CODE_BITS).to(tl.uint64)
        bits = bits | ((rest << 1) << (63 - shift))
    return bits


@triton.jit
def _payload(tile, lane, q, CODE_BITS: tl.constexpr):
    """Number q of the CODE_BITS / 4 u32 of a lane, 0 beyond them: they lie in pieces of 16, then 8, then 4 bytes."""
    IN_16: tl.constexpr = CODE_BITS // 16 * 4
    IN_8: tl.constexpr = CODE_BITS % 16 // 8 * 2
    at = 32 * (q - q % 4) + 4 * lane + q % 4
    if CODE_BITS % 16 != 0:
        rest = q - IN_16
        in_8 = 32 * IN_16 + 2 * lane + rest
        in_4 = 32 * (IN_16 + IN_8) + lane
        at = tl.where(rest < 0, at, tl.where(rest < IN_8, in_8, in_4))
    return tl.load(tile + at, mask=q < CODE_BITS // 4, other=0)


@triton.jit
def decode_tile(
    words,
    following,
    table,
    CODE_BITS: tl.constexpr,
    FAMILY: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What `load_words` gave → even and odd columns [tile rows, 32] in DTYPE: the codec's fp32 values rounded once."""
    ROWS: tl.constexpr = 64 if FAMILY == "trellis" else 32
    if FAMILY == "trellis":
        even, odd = _trellis_values(words, following, table, CODE_BITS, FIRST, DTYPE)
    elif FAMILY == "e8":
        even, odd = _e8_values(words.to(tl.uint32), table, FIRST, SECOND)
    else:
        even, odd = nested_values(words.to(tl.uint32), table, FIRST, SECOND)
    return tl.reshape(even.to(DTYPE), (ROWS, 32)), tl.reshape(odd.to(DTYPE), (ROWS, 32))


@triton.jit
def _look_up(table, index):
    """table [n], index [8, 8, 32] → their entries, by shared memory: the cache takes a cycle for each line."""
    flat = tl.gather(table, tl.reshape(index, (2048,)).to(tl.int32), 0)
    return tl.reshape(flat, (8, 8, 32))


@triton.jit
def _trellis_values(
    words,
    following,
    table,
    CODE_BITS: tl.constexpr,
    SIGNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Pairs [8, 8, 32] in what the table holds: fp16 where DTYPE is fp32, otherwise DTYPE. SIGNS: that it has."""
    PAIR: tl.constexpr = tl.float16 if DTYPE.is_fp32() else DTYPE
    h = trellis_states(words, following, CODE_BITS)
    if SIGNS == 2:
        pair = _look_up(table, h >> 6 & 0x3FF)
    elif SIGNS == 1:
        pair = _look_up(table, (h >> 5 & 0xFF) | (h >> 6 & 0x300)) ^ (h << 2 & 0x8000)
    else:
        pair = _look_up(table, (h >> 7 & 0xFF) | (h >> 8 & 0x300)) ^ (h & 0x80008000)
    even = pair.to(tl.uint16).to(PAIR, bitcast=True)
    odd = (pair >> 16).to(tl.uint16).to(PAIR, bitcast=True)
    return even, odd


@triton.jit
def trellis_states(words, following, CODE_BITS: tl.constexpr):
    """The hashed states [8, …] u32 of words and what follows them in their strips."""
    begin = CODE_BITS * tl.arange(0, 8)[:, None, None] // 8
    own = (words >> begin.to(words.dtype)).to(tl.uint32)
    # a pair with all its 16 bits in its own word shifts the next word's out of them
    spill = following << tl.minimum(CODE_BITS - begin, 16).to(tl.uint32)
    return ((own | spill) & 0xFFFF) * _MULTIPLIER


@triton.jit
def _e8_values(words, table, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Pairs [4, 8, 32] in fp32. The second stage's table has the gain in it: one sum, which nothing can fuse."""
    even, odd = _e8_stage(words, table, FIRST)
    if SECOND > 0:
        even2, odd2 = _e8_stage(words >> (2 + 2 * FIRST), table + (8 << FIRST), SECOND)
        even += even2
        odd += odd2
    return even, odd


@triton.jit
def _e8_stage(words, table, ENTRY_BITS: tl.constexpr):
    """table: u64 pointer to pairs of fp32, two for each entry of a half table."""
    i = tl.arange(0, 4)[:, None, None]
    coset = (words >> (2 * ENTRY_BITS)) & 3
    half = tl.where(i < 2, words >> ENTRY_BITS, words) & ((1 << ENTRY_BITS) - 1)
    entry = ((coset << ENTRY_BITS) + half).to(tl.int32)
    pair = tl.load(table + (entry * 2 + (i & 1)))  # with i % 2 Triton sees runs of two, and moves all to suit them
    even = pair.to(tl.uint32).to(tl.float32, bitcast=True)
    odd = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def nested_values(words, table, Q: tl.constexpr, LOW_BITS: tl.constexpr):
    """Pairs [4, 8, 32] in fp32; integers up to one product with β/2.

    d and r are those of u = 0. Those of u = Q follow from them: d' = d ± Q, |d'| = Q − |d|, and r' = r − 1 where d < 0;
    so the difference of the two norms needs no squares, and a word's worst component for u = Q is its smallest d.
    """
    high = words
    SCALE_BIT: tl.constexpr = 8 * LOW_BITS + (13 if Q % 3 == 0 else 0)
    if Q % 3 == 0:
        high = tl.load(table + 16 + ((words >> (8 * LOW_BITS)) & 0x1FFF))
    half_beta = tl.load(table + (words >> SCALE_BIT)).to(tl.float32, bitcast=True)
    even, odd = _nested_point(words, high, Q, LOW_BITS)
    even, even_r = _nested_remainder(even, Q)
    odd, odd_r = _nested_remainder(odd, Q)
    # sizes with the sign as their lowest bit; with twice an index added, they order as |d| and then as the index
    even_size, odd_size = _nested_size(even), _nested_size(odd)
    k = 2 * tl.arange(0, 4)[:, None, None]
    largest = tl.max(tl.maximum(even_size + 2 * (7 - k), odd_size + 2 * (6 - k)), 0, keep_dims=True)
    smallest = tl.min(tl.minimum(even_size + 2 * k, odd_size + 2 * (k + 1)), 0, keep_dims=True)
    total = tl.sum(even_size + odd_size, 0, keep_dims=True)
    parity = tl.sum(even_r + odd_r, 0, keep_dims=True) & 1
    other_parity = (parity + total) & 1
    other = 4 * Q - (total >> 4) + 2 * other_parity * (smallest >> 4) < 2 * parity * (Q - (largest >> 4))
    # the worst component is never 0: y₀ and y₁ have different parities, so some component is not 0 modulo Q
    worst = tl.where(other, smallest >> 1, 7 - (largest >> 1)) & 7
    upwards = tl.where(other, (smallest & 1) ^ 1, largest & 1)
    flip = 2 * Q * tl.where(other, other_parity, parity) * (2 * upwards - 1)
    move = tl.where(other, Q, 0)
    even += tl.where(even < 0, move, -move) + tl.where(worst == k, flip, 0)
    odd += tl.where(odd < 0, move, -move) + tl.where(worst == k + 1, flip, 0)
    return even.to(tl.float32) * half_beta, odd.to(tl.float32) * half_beta


@triton.jit
def _nested_point(words, high, Q: tl.constexpr, LOW_BITS: tl.constexpr):
    """The digits' point y ≥ 0: its even components and its odd ones, both [4, 8, 32] int32."""
    i = tl.arange(0, 4)[:, None, None]
    even = _nested_digit(words, high, 2 * i, Q, LOW_BITS)
    odd = _nested_digit(words, high, 2 * i + 1, Q, LOW_BITS)
    last = _nested_digit(words, high, 7, Q, LOW_BITS)
    six = tl.sum(tl.where(i < 3, even + odd, 0), 0, keep_dims=True)
    even = 2 * even + last + tl.where(i == 0, 1, tl.where(i == 3, 2 * (six + even), 0))
    odd = tl.where(i == 3, last, 2 * odd + last)
    return even, odd


@triton.jit
def _nested_digit(words, high, k, Q: tl.constexpr, LOW_BITS: tl.constexpr):
    """Digit k of the words. `high` has the high digits, which are below 3, in two bits each."""
    digit = ((words >> (LOW_BITS * k)) & ((1 << LOW_BITS) - 1)).to(tl.int32)
    if Q % 3 == 0:
        digit += ((high >> (2 * k)) & 3).to(tl.int32) << LOW_BITS
    return digit


@triton.jit
def _nested_remainder(y, Q: tl.constexpr):
    """d = y − 2Q·r in [−Q, Q), and r. The division is exact for dividends below 2^11, and these are below 2^8."""
    r = ((y + Q) * (65536 // (2 * Q) + 1)) >> 16
    return y - 2 * Q * r, r


@triton.jit
def _nested_size(d):
    """16·|d|, plus 1 where d < 0."""
    return tl.abs(d) * 16 + (d.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
