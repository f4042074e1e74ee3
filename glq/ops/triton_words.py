"""Triton functions under triton_one_token_kernel.py: words of codes as they lie in memory, and their products with x.

n counts (tile, step, g, t, e): word j = step · SIZE + e of lane 4·g + t. docs/FORMAT.md says what the words mean.
"""

import triton
import triton.language as tl

from glq.ops.triton_decode import lane_words, nested_values, trellis_states


@triton.jit
def load_words(
    codes,
    tile,
    last,
    n,
    first_g,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CODE_BITS: tl.constexpr,
    FAMILY: tl.constexpr,
):
    """The words n of tiles up to `last`, and the next ones of their strips; a thread has WIDTH in a row."""
    at_tile = tl.minimum(tile, last)
    if CODE_BITS == 16 or CODE_BITS == 32 or CODE_BITS == 64:
        if CODE_BITS == 16:
            codes = codes.to(tl.pointer_type(tl.uint16))
        elif CODE_BITS == 64:
            codes = codes.to(tl.pointer_type(tl.uint64))
        at = at_tile * 256 + n // (4 * SIZE * GROUP) % (8 // SIZE) * (32 * SIZE)
        own = first_g * (4 * SIZE) + n % (4 * SIZE * GROUP)
        words = tl.load(tl.max_contiguous(codes + (at + own), (1, 1, WIDTH)))
        following = words
        if FAMILY == "trellis":
            following = tl.load(tl.max_contiguous(codes + (at + (own + 4 * SIZE) % (32 * SIZE)), (1, 1, WIDTH)))
        following = following.to(tl.uint32)
    else:
        lane = first_g * 4 + n // 8 % (4 * GROUP)
        words, following = lane_words(codes + at_tile * (8 * CODE_BITS), lane, n % 8, CODE_BITS, FAMILY)
    return words, following


@triton.jit
def load_lanes_48(codes, tile, last, n, first_g, GROUP: tl.constexpr):
    """The three pieces of lanes that have words of 48 bits, and those of the lanes that have the next ones: u32.

    n counts (tile, g, t, e): u32 e of a piece.
    """
    at = tl.minimum(tile, last) * 384
    own = first_g * 16 + n % (16 * GROUP)
    following = (own + 16) % 128
    a, b, c = _load4(codes, at + own), _load4(codes, at + own + 128), _load4(codes, at + own + 256)
    d, e, f = _load4(codes, at + following), _load4(codes, at + following + 128), _load4(codes, at + following + 256)
    return a, b, c, d, e, f


@triton.jit
def _load4(codes, at):
    return tl.load(tl.max_contiguous(tl.multiple_of(codes + at, (1, 1, 16)), (1, 1, 4)))


@triton.jit
def words_48(a, b, c, d, e, f):
    """What load_lanes_48 gave → words 0 to 3 of each lane, what follows them, words 4 to 7, and what follows those."""
    a0, a1, a2, a3 = _split4(a)
    b0, b1, b2, b3 = _split4(b)
    c0, c1, c2, c3 = _split4(c)
    d0, d1, _, d3 = _split4(d)
    e0, _, e2, e3 = _split4(e)
    _, f1, f2, _ = _split4(f)
    words, words2 = _four_48(a0, a1, a2, a3, b0, b1), _four_48(b2, b3, c0, c1, c2, c3)
    return words, _join4(d0, d1 >> 16, d3, e0 >> 16), words2, _join4(e2, e3 >> 16, f1, f2 >> 16)


@triton.jit
def _four_48(r0, r1, r2, r3, r4, r5):
    """Six u32 → four words, u64."""
    low = _join4(r0, r1 >> 16 | r2 << 16, r3, r4 >> 16 | r5 << 16)
    high = _join4(r1 & 0xFFFF, r2 >> 16, r4 & 0xFFFF, r5 >> 16)
    return low.to(tl.uint64) | high.to(tl.uint64) << 32


@triton.jit
def _split4(v):
    """[1, 1, 4n] → every fourth, from each of the first four on: four times [1, 1, n]."""
    even, odd = tl.split(tl.reshape(v, (1, 1, v.shape[2] // 4, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _join4(v0, v1, v2, v3):
    """The reverse of _split4."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (1, 1, 4 * v0.shape[2]))


@triton.jit
def add_products(
    acc,
    words,
    following,
    table,
    x,
    FAMILY: tl.constexpr,
    CODE_BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    GAIN: tl.constexpr,
    PTX: tl.constexpr,
):
    """acc [i, 1, n] plus the decoded pairs times those of x; those of E8 in units of the first lattice.

    FIRST, SECOND: as in triton_decode.py. GAIN: the second lattice's unit.
    """
    if FAMILY == "trellis":
        even, odd = _halves(_trellis_pairs(words, following, table, CODE_BITS, FIRST), PTX)
    elif FAMILY == "e8":
        words = words.to(tl.uint32)
        even, odd = _halves(_e8_pairs(words, table, FIRST, 0), PTX)
        if SECOND > 0:
            even2, odd2 = _halves(_e8_pairs(words >> (2 + 2 * FIRST), table, SECOND, 4 << FIRST), PTX)
            even += GAIN * even2
            odd += GAIN * odd2
    else:
        even, odd = nested_values(words.to(tl.uint32), table, FIRST, SECOND)
    acc += even * x.to(tl.uint32).to(tl.float32, bitcast=True)
    acc += odd * (x >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return acc


@triton.jit
def _trellis_pairs(words, following, table, CODE_BITS: tl.constexpr, SIGNS: tl.constexpr):
    """u32. SIGNS: of a pair, that decoding_table has; here the table has one more (triton_tables.one_token_table)."""
    h = trellis_states(words, following, CODE_BITS)
    if SIGNS == 2:
        return _look_up(table, h >> 6 & 0x3FF)
    elif SIGNS == 1:  # noqa: RET505 (Triton compiles one branch)
        return _look_up(table, h >> 5 & 0x7FF)
    else:
        return _look_up(table, h >> 7 & 0x7FF) ^ (h & 0x80000000)


@triton.jit
def _e8_pairs(words, table, ENTRY_BITS: tl.constexpr, START: tl.constexpr):
    """u32. table: u64, four fp16 an entry of a half table, which begins at START."""
    first = (words >> (2 * ENTRY_BITS) & 3) << ENTRY_BITS
    shift = (ENTRY_BITS * (1 - tl.arange(0, 2)[:, None, None])).to(tl.uint32)
    fours = _look_up(table, START + (first | (words >> shift & ((1 << ENTRY_BITS) - 1))))
    pairs = tl.join(fours.to(tl.uint32), (fours >> 32).to(tl.uint32))
    return tl.reshape(tl.permute(pairs, (0, 3, 1, 2)), (4, 1, words.shape[2]))


@triton.jit
def _look_up(table, index):
    """table [entries], index [i, 1, n] → their entries, by shared memory: the cache takes a cycle for each line."""
    flat = tl.reshape(index, (index.shape[0] * index.shape[2],)).to(tl.int32)
    return tl.reshape(tl.gather(table, flat, 0), index.shape)


@triton.jit
def _halves(pair, PTX: tl.constexpr):
    """u32 → its two fp16, in fp32. In PTX, since LLVM packs low halves of two pairs to convert them together."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
            "=f,=f,r",
            [pair],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 (Triton compiles one branch)
        even = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return even, odd
