// What a warp decodes of a unit in prompt.cu: of each tile of 64 × 64 the part-th 16 rows, 16 pairs a lane, as wgmma takes them from registers.
// take: what says where they are in the table; look_up: the four pairs of a step; complete: signs that the table lacks. For trellis codes and factored E8 codes.

#ifdef NESTED  // lattice.cuh
// A warp has one half of each of its tile's words: an entry, or two, of two pairs.
static constexpr int TAKEN_WORDS = SECOND ? 16 : 8;
static constexpr bool BRANCHES = false;  // whether `take` begins with a branch
// Where the entry of a word's half begins, of a table of four times 2^BITS, which begins at `first`.
template <int BITS> __device__ __forceinline__ u32 place_of(u32 word, int half, u32 first) {
  constexpr u32 MASK = (1 << BITS) - 1;
  const u32 upper = word >> BITS, entry = half ? word : upper;
  return ((entry & MASK | upper & 3 << BITS) + first) * STRIDE;
}
__device__ __forceinline__ void take(u32* places, const u32* r, int part, int) {
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 word = word_of(r, i);
    places[i] = place_of<FIRST>(word, part % 2, 0);
    if (SECOND) places[8 + i] = place_of<SECOND>(word >> 2 + 2 * FIRST, part % 2, 4 << FIRST);
  }
}
__device__ __forceinline__ void look_up(u32* found, const u32* places, int s, u32 copy) {
  #pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint2 two = load_shared8((places[2 * s + i] | copy) + TABLE_AT);
    if (SECOND) {
      const uint2 more = load_shared8((places[2 * s + i + TAKEN_WORDS / 2] | copy) + TABLE_AT);
      two.x = BF16 ? fma2_bf16(two.x, 0x3F803F80, more.x) : add2(two.x, more.x);
      two.y = BF16 ? fma2_bf16(two.y, 0x3F803F80, more.y) : add2(two.y, more.y);
    }
    found[2 * i] = two.x, found[2 * i + 1] = two.y;
  }
}
__device__ __forceinline__ u32 complete(u32 pair, const u32*, int, u32 none) { return pair ^ none; }
#else
static constexpr int TAKEN_WORDS = 16;
static constexpr bool BRANCHES = true;
// Of the eight words that a lane has of a tile, the hashes of two pairs of the part-th 16 rows each. Only those of the last part, or two, go on in
// the word after it in the strip, which lane `after` has.
__device__ __forceinline__ void take(u32* hashes, const u32* r, int part, int after) {
  constexpr int END = CODE_BITS % 32, STEP = CODE_BITS / 8;
  if (CODE_BITS == 64) {  // bytes
    if (part == 3) {
      #pragma unroll
      for (int i = 0; i < 8; ++i) {
        const u32 next = __shfl_sync(~0u, r[2 * i], after);
        hashes[2 * i] = prmt(r[2 * i + 1], 0, 0x3232), hashes[2 * i + 1] = prmt(r[2 * i + 1], next, 0x4343);
      }
    } else {
      #pragma unroll
      for (int i = 0; i < 16; ++i) hashes[i] = prmt(r[i / 2 * 2], r[i / 2 * 2 + 1], (i % 2 ? 0x2121 : 0x1010) + 0x2222 * part);
    }
    #pragma unroll
    for (int i = 0; i < 16; ++i) hashes[i] *= HASH_OF_TWO;
    return;
  }
  u32 words[8];
  const int skip = CODE_BITS * part / 4;  // bits of a word that are others'
  const bool late = skip >= 32, goes_on = skip + CODE_BITS / 8 + 16 > CODE_BITS;
  auto word = [&](int i, int n) {  // its n-th 32 bits
    const int at = CODE_BITS * i / 32 + n, shift = CODE_BITS * i % 32;
    return at >= REGS ? 0 : shift == 0 || at + 1 >= REGS ? r[at] >> shift : __funnelshift_r(r[at], r[at + 1], shift);
  };
  if (goes_on) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      u32 w[3] = {word(i, 0), word(i, 1), 0};
      const u32 next = __shfl_sync(~0u, w[0], after);
      if (CODE_BITS == 32) w[1] = next;
      else if (CODE_BITS == 48) w[1] = prmt(w[1], next, 0x5410);
      else {
        u32* const last = w + CODE_BITS / 32;
        last[0] = last[0] & ((1u << END) - 1) | next << END;
        last[1] = (next & 0xFFFF) >> (32 - END);
      }
      words[i] = __funnelshift_r(late ? w[1] : w[0], late ? w[2] : w[1], skip % 32);
    }
  } else {
    #pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = __funnelshift_r(late ? word(i, 1) : word(i, 0), word(i, 1), skip % 32);
  }
  #pragma unroll
  for (int i = 0; i < 16; ++i) {
    const u32 w = words[i / 2] >> STEP * (i % 2);
    hashes[i] = HASH * (MASKED ? lower16(w) : w);
  }
}
__device__ __forceinline__ void look_up(u32* found, const u32* hashes, int s, u32 copy) {
  #pragma unroll
  for (int i = 0; i < 4; ++i) found[i] = load_shared((place_of(hashes[4 * s + i]) | copy) + TABLE_AT);
}
__device__ __forceinline__ u32 complete(u32 pair, const u32* hashes, int i, u32 none) { return pair ^ (APART ? hashes[i] & APART : none); }
#endif
