// How a warp decodes a tile of a trellis code straight into mma fragments, and multiplies it.
// Macros, besides those of ptx.cuh: CODE_BITS, TABLE_BITS, COPIES of the table in shared memory, NT (8 tokens each).

static constexpr int REGS = CODE_BITS / 4;  // of a lane's codes in a tile
static constexpr int TILE_BYTES = 32 * CODE_BITS;
static constexpr int STRIDE = 4 * COPIES;  // bytes from one table entry to the next
static constexpr u32 HASH = 0x9E3779B1u * 0xFFFF0001u;  // of a state written twice: s · 65537 · HASH = s · 0x9E3779B1 mod 2^32

// A lane's codes of one tile: pieces of 16, 8 and 4 bytes, the lanes' side by side.
__device__ __forceinline__ void load_codes(u32* r, const u8* tile, int lane) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  #pragma unroll
  for (int i = 0; i < P16; ++i) load16(r + 4 * i, tile + 512 * i + 16 * lane);
  if (P8) load8(r + 4 * P16, tile + 512 * P16 + 8 * lane);
  if (P4) load4(r + REGS - 1, tile + 32 * (CODE_BITS - 4) + 4 * lane);
}
// Bits `at` … at + 15 of a lane's string, low; what lies above is not masked.
__device__ __forceinline__ u32 bits16(const u32* r, int at) {
  const int i = at / 32, shift = at % 32;
  return shift == 0 ? r[i] : shift <= 16 ? r[i] >> shift : __funnelshift_r(r[i], r[i + 1], shift);
}
// The same in both halves.
__device__ __forceinline__ u32 twice(const u32* r, int at) {
  const int i = at / 32, byte = at % 32 / 8;
  if (at % 8 == 0) return prmt(r[i], byte == 3 ? r[i + 1] : r[i], 0x1010u + 0x1111u * byte);
  const u32 w = bits16(r, at);
  return prmt(w, w, 0x1010);
}
__device__ __forceinline__ u32 value(u32 state2, u32 table) {
  const u32 h = state2 * HASH;
  constexpr u32 MASK = 0x7FFFu & ~((1u << (15 - TABLE_BITS)) - 1);  // where the entry lies in h
  constexpr int LOW = 1 << (15 - TABLE_BITS);
  const u32 at = LOW == STRIDE ? (h & MASK) | table : LOW < STRIDE ? (h & MASK) * (STRIDE / LOW) + table : ((h & MASK) / (LOW / STRIDE)) + table;
  return load_shared(at) ^ (h & 0x80008000u);
}
// acc[row tile][token tile][4] += the tile · x; xs: this lane's columns of its token, in halves.
__device__ __forceinline__ void tile_product(float (*acc)[NT][4], const u32* r, const u16* xs, int token_stride, u32 table) {
  #pragma unroll
  for (int s = 0; s < 4; ++s) {
    u32 ends[2];  // of words 2s and 2s + 1: the last 16 bits, and the first 16 of the word after it in the strip
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int begin = CODE_BITS * (2 * s + i);
      const u32 next = __shfl_sync(~0u, bits16(r, begin), (threadIdx.x + 4) & 31);
      ends[i] = prmt(bits16(r, begin + CODE_BITS - 16), next, 0x5410);
    }
    uint2 b[NT];
    #pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = *(const uint2*)(xs + n * token_stride + 4 * s);
    #pragma unroll
    for (int m = 0; m < 4; ++m) {
      u32 a[4];
      #pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = 2 * s + e / 2, at = CODE_BITS * (2 * m + e % 2) / 8, over = at - (CODE_BITS - 16);
        u32 state2;
        if (over <= 0) state2 = twice(r, CODE_BITS * j + at);
        else if (over == 8) state2 = prmt(ends[e / 2], ends[e / 2], 0x2121);
        else { const u32 w = ends[e / 2] >> over; state2 = prmt(w, w, 0x1010); }
        a[e] = value(state2, table);
      }
      #pragma unroll
      for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n].x, b[n].y);
    }
  }
}
