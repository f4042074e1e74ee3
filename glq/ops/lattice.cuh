// How a warp decodes a tile of 64 × 64 of an E8 code straight into mma fragments: what tiles.cuh is for trellis codes. Such a tile is two tiles of
// docs/FORMAT.md, one below the other, of 32 rows each.
// Macros, besides those of codes.cuh: NESTED (q, or 0 for a factored code), FIRST (bits of an entry of a half coset's; of a low digit), SECOND (those of the
// second stage, or 0), COPIES of a table in shared memory.

static constexpr int TALL = 2, REGS = 2 * LANE_REGS;
static constexpr bool SPREAD = false;  // as tiles.cuh has it
static constexpr u32 HOLE = 0;

// How codes are loaded. Of a matrix whose last 64 rows have one tile, that is taken twice.
struct Loader {
  const u8* end;  // of tiles that have one below
  int below;      // from a tile to that

  __device__ __forceinline__ Loader(const u8* codes, int rows, int col_tiles) : below(col_tiles * TILE_BYTES) {
    end = codes + (size_t)((rows - 1) / 32) * below;
  }
  __device__ __forceinline__ const u8* second(const u8* tile) const { return tile + (tile < end ? below : 0); }
  __device__ __forceinline__ void load(u32* r, const u8* tile, int lane) const {
    load_codes(r, tile, lane);
    load_codes(r + LANE_REGS, second(tile), lane);
  }
  __device__ __forceinline__ void load_used(u32* r, const u8* tile, int lane, int s) const {
    ::load_used(r, tile, lane, s);
    ::load_used(r + LANE_REGS, second(tile), lane, s);
  }
};
// Word j of a lane's eight, low; what lies above is not masked.
__device__ __forceinline__ u32 word_of(const u32* r, int j) {
  const int i = CODE_BITS * j / 32, shift = CODE_BITS * j % 32;
  return shift + CODE_BITS <= 32 ? r[i] >> shift : __funnelshift_r(r[i], r[i + 1], shift);
}

#if NESTED
// ---- nested E8 (codecs/nested.py): two words at a time, word a in the low halves of registers, word b in the high ones ----
//
// Numbers are multiples of UNIT in fp16, all of them exact: as numbers of fp16 the fields of a word, taken out by a mask, are multiples of 2^-24.

// The table: each β / 2 over UNIT, in fp32; from DIGITS_AT on, if q is a multiple of 3, COPIES of four digits in base 3 of each number up to 101, times LOW UNIT.
static constexpr u32 DIGITS_AT = 128, NUMBERS = NESTED % 3 ? 0 : 102, STRIDE = 8 * COPIES, TABLE_BYTES = (DIGITS_AT + STRIDE * NUMBERS + 1023) / 1024 * 1024;
static constexpr double UNIT = 1. / 512, MAGIC = 1536;  // what is added to MAGIC is rounded to a whole number, which is in its lowest bits
static constexpr int LOW = 1 << SECOND, SCALE_AT = 8 * SECOND + (NESTED % 3 ? 0 : 13);

__device__ __forceinline__ u32 own_copy() { return 8 * (threadIdx.x % COPIES); }
// By the first COUNT threads of a block.
template <int COUNT> struct Filler {
  const u32* const from;

  __device__ __forceinline__ Filler(const u32* from) : from(from) {}
  __device__ __forceinline__ void fill(u8* memory) const {
    if (threadIdx.x < DIGITS_AT / 4) ((u32*)memory)[threadIdx.x] = from[threadIdx.x];
    for (int i = threadIdx.x; i < NUMBERS * COPIES; i += COUNT) ((uint2*)(memory + DIGITS_AT))[i] = ((const uint2*)(from + DIGITS_AT / 4))[i / COPIES];
  }
};
// The high digits of a word.
__device__ __forceinline__ void high_digits(uint2* four, u32 word, u32 copy) {
  const u32 number = word >> 8 * SECOND & 0x1FFF, upper = number * 207127 >> 24;  // divided by 81
  four[0] = load_shared8(((number - 81 * upper) * STRIDE | copy) + TABLE_AT + DIGITS_AT);
  four[1] = load_shared8((upper * STRIDE | copy) + TABLE_AT + DIGITS_AT);
}
// The digits c of two words.
__device__ __forceinline__ void digits_of(u32* c, u32 a, u32 b, u32 copy) {
  constexpr u32 MASK = (LOW - 1) * 0x10001u;
  if (NESTED % 3 == 0) {
    uint2 of_a[2], of_b[2];
    high_digits(of_a, a, copy);
    high_digits(of_b, b, copy);
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      c[4 * i] = prmt(of_a[i].x, of_b[i].x, 0x5410), c[4 * i + 1] = prmt(of_a[i].x, of_b[i].x, 0x7632);
      c[4 * i + 2] = prmt(of_a[i].y, of_b[i].y, 0x5410), c[4 * i + 3] = prmt(of_a[i].y, of_b[i].y, 0x7632);
    }
  }
  const u32 parts[3] = {prmt(a, b, 0x5410), prmt(a, b, 0x6521), prmt(a, b, 0x7632)};  // of the words, from bit 0, 8 and 16 on
  #pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int begin = SECOND * k, part = max(begin - (10 - SECOND) + 7, 0) / 8, at = begin - 8 * part;  // so that the field is a number of fp16
    const u32 field = parts[part] & MASK << at, by = both(32768 >> at);
    c[k] = NESTED % 3 ? multiply2(field, by) : fma2(field, by, c[k]);
  }
}
// Twice the points of two words: the shortest vectors of y + 2q·E8, where y is what the digits say (docs/FORMAT.md).
__device__ __forceinline__ void points_of(u32* out, u32 a, u32 b, u32 copy) {
  constexpr int Q = NESTED;
  u32 c[8], d[8], r[7];
  digits_of(c, a, b, copy);
  // d: y modulo 2q; r: how often 2q was taken away
  const u32 sum = add2(add2(add2(c[0], c[1]), add2(c[2], c[3])), add2(c[4], c[5]));
  c[6] = fma2(c[6], both(2), sum);
  #pragma unroll
  for (int k = 0; k < 7; ++k) d[k] = fma2(c[k], both(2), k ? c[7] : add2(c[7], both(UNIT)));
  d[7] = c[7];
  constexpr u32 inverse = both(512. / (2 * Q)) + 0x10001;  // the next number above, so that halves are rounded up
  const u32 rounded = fma2(d[6], inverse, both(MAGIC));
  r[6] = subtract2(rounded, both(MAGIC));
  #pragma unroll
  for (int k = 0; k < 6; ++k) r[k] = fma_within_1(d[k], both(1 / UNIT), both(1 - Q));  // y is less than 3q
  #pragma unroll
  for (int k = 0; k < 7; ++k) d[k] = fma2(r[k], both(-2 * Q * UNIT), d[k]);
  const u32 parity = (r[0] ^ r[1] ^ r[2] ^ r[3] ^ r[4] ^ r[5]) << 5 ^ rounded << 15;  // of Σ r, as a sign
  const u32 is_odd = signs2(parity), other_is_odd = signs2(parity ^ d[0] ^ d[1] ^ d[2] ^ d[3] ^ d[4] ^ d[5] ^ d[6]);
  // Of u = q it is |d'| = q − |d|. The sum of squares for u = q less that for u = 0, over 2q:
  u32 largest = abs2(d[0]), smallest = largest, total = largest;
  #pragma unroll
  for (int k = 1; k < 8; ++k) largest = max2(largest, abs2(d[k])), smallest = min2(smallest, abs2(d[k])), total = add2(total, abs2(d[k]));
  u32 more = subtract2(fma2(smallest & other_is_odd, both(2), both((4 * Q + 0.5) * UNIT)), total);  // ½: not 0
  more = fma2(subtract2(both(Q * UNIT), largest) & is_odd, both(-2), more);
  const u32 other = signs2(more), away = other & both(Q * UNIT), flip_sign = other & SIGNS;
  // The first of its largest goes to the other side, if Σ r is odd: that of the largest rank.
  constexpr double LEAST = UNIT / 32;  // from a rank to the next
  u32 ranks[8], highest;
  #pragma unroll
  for (int k = 0; k < 8; ++k) {
    const u32 size = abs2(d[k]) | flip_sign;
    ranks[k] = k ? subtract2(size, both(max(k, 1) * LEAST)) : size;
    highest = k ? max2(highest, ranks[k]) : ranks[k];
  }
  const u32 from_highest = subtract2(both(LEAST), highest);
  const u32 flip = choose(other, other_is_odd & both(-2 * Q * UNIT / LEAST), is_odd & both(2 * Q * UNIT / LEAST));
  #pragma unroll
  for (int k = 0; k < 8; ++k) {
    const u32 is = add_within_1(ranks[k], from_highest);  // LEAST or 0
    out[k] = subtract2(d[k], fma2(is, flip, away) ^ d[k] & SIGNS);
  }
}
// Pairs i of words a and b: components 2i and 2i + 1.
__device__ __forceinline__ void pairs_of(u32* of_a, u32* of_b, u32 a, u32 b, u32 copy) {
  constexpr u32 MASK = (1 << CODE_BITS - SCALE_AT) - 1;
  auto beta_of = [&](u32 word) { return __uint_as_float(load_shared(TABLE_AT + 4 * (word >> SCALE_AT & MASK))); };
  const u32 beta = pack_half(beta_of(a), beta_of(b));
  u32 x[8];
  points_of(x, a, b, copy);
  #pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = multiply2(x[k], beta);
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 even = x[2 * i], odd = x[2 * i + 1];
    of_a[i] = BF16 ? pack_bf16(from_half((u16)even), from_half((u16)odd)) : prmt(even, odd, 0x5410);
    of_b[i] = BF16 ? pack_bf16(from_half((u16)(even >> 16)), from_half((u16)(odd >> 16))) : prmt(even, odd, 0x7632);
  }
}
#else
// ---- factored E8 (codecs/e8.py): each half of a word is an entry of a table of four 16-bit numbers ----

static constexpr u32 STRIDE = 8 * COPIES, ENTRIES = (4 << FIRST) + (SECOND ? 4 << SECOND : 0), TABLE_BYTES = STRIDE * ENTRIES;

__device__ __forceinline__ u32 own_copy() { return 8 * (threadIdx.x % COPIES); }
static_assert(COPIES >= 2, "16 bytes are two copies");
template <int COUNT> struct Filler : TableFiller<COUNT, ENTRIES, COPIES / 2, uint2> {
  using TableFiller<COUNT, ENTRIES, COPIES / 2, uint2>::TableFiller;

  __device__ __forceinline__ void fill(u8* memory) {
    this->put([&](int entry) { return memory + entry * STRIDE; }, [](uint2 v) { return make_uint4(v.x, v.y, v.x, v.y); });
  }
};
// The entries of a word of one stage, whose entries begin at `first`.
template <int BITS> __device__ __forceinline__ void stage_of(uint2* halves, u32 word, u32 first, u32 copy) {
  constexpr u32 MASK = (1 << BITS) - 1;
  const u32 coset = (word >> 2 * BITS & 3) << BITS, at = TABLE_AT + first * STRIDE;
  halves[0] = load_shared8(((coset | word >> BITS & MASK) * STRIDE | copy) + at);
  halves[1] = load_shared8(((coset | word & MASK) * STRIDE | copy) + at);
}
__device__ __forceinline__ void pairs_of_word(u32* pairs, u32 word, u32 copy) {
  uint2 halves[2];
  stage_of<FIRST>(halves, word, 0, copy);
  pairs[0] = halves[0].x, pairs[1] = halves[0].y, pairs[2] = halves[1].x, pairs[3] = halves[1].y;
#if SECOND
  stage_of<SECOND>(halves, word >> 2 + 2 * FIRST, 4 << FIRST, copy);
  const u32 more[4] = {halves[0].x, halves[0].y, halves[1].x, halves[1].y};
  #pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = BF16 ? fma2_bf16(pairs[i], 0x3F803F80, more[i]) : add2(pairs[i], more[i]);
#endif
}
__device__ __forceinline__ void pairs_of(u32* of_a, u32* of_b, u32 a, u32 b, u32 copy) {
  pairs_of_word(of_a, a, copy);
  pairs_of_word(of_b, b, copy);
}
#endif

// The fragments of both times 16 rows of a tile of 32, whose codes are in r, in step s.
__device__ __forceinline__ void fragments(u32 (*a)[4], const u32* r, int s, u32 copy) {
  u32 of_a[4], of_b[4];
  pairs_of(of_a, of_b, word_of(r, 2 * s), word_of(r, 2 * s + 1), copy);
  #pragma unroll
  for (int i = 0; i < 4; ++i) a[i / 2][i % 2] = of_a[i], a[i / 2][2 + i % 2] = of_b[i];
}
// The fragment of rows 16m … 16m + 15 in step s, for m from 0 to 3 in this order. held: the pairs of words 2s and 2s + 1 of a half of the tile.
static constexpr int OF_STEP = 8;
__device__ __forceinline__ void begin_step(u32*, const u32*, int) {}
__device__ __forceinline__ void fragment(u32* a, u32* held, const u32* r, int s, int m, u32 copy) {
  const u32* const own = r + m / 2 * LANE_REGS;
  if (m % 2 == 0) pairs_of(held, held + 4, word_of(own, 2 * s), word_of(own, 2 * s + 1), copy);
  #pragma unroll
  for (int e = 0; e < 4; ++e) a[e] = held[e / 2 * 4 + m % 2 * 2 + e % 2];
}
