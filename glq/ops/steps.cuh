// How a warp decodes 16 columns of a tile of a trellis code, a step, into rows of 64 that wgmma reads from shared memory.
// All steps take the same instructions, which the warps of a block share.

static constexpr int ROW_TILE = 64 * 128;  // bytes of 64 rows of 64 columns, in 16 bits

// Where a lane's pairs of a step lie in the tile of 64 rows, whose chunks of 16 bytes are swizzled: the first of those in
// rows lane / 4. Columns are in an order that keeps banks apart: of column 16t + 4s + i that is 32 (t / 2) + 8s + 4 (t % 2) + i.
__device__ __forceinline__ u32 place_of_step(int s, int lane) {
  const int g = lane / 4, t = lane % 4;
  return g * 128 + ((t / 2 * 4 + s) ^ g) * 16 + t % 2 * 8;
}
// A lane's codes of a step: 2 · CODE_BITS of its string, which may begin inside a register.
struct Step {
  static constexpr int WORDS = CODE_BITS / 16 + (CODE_BITS % 16 > 0), LOADED = CODE_BITS % 16 ? (2 * CODE_BITS + 24 + 31) / 32 : WORDS;
  u32 at[LOADED], shift;  // in a tile, in bytes; bits before the step

  __device__ Step(int s, int lane) {
    constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8;
    shift = 2 * CODE_BITS * s % 32;
    #pragma unroll
    for (int i = 0; i < LOADED; ++i) {
      const int n = min(2 * CODE_BITS * s / 32 + i, REGS - 1);
      at[i] = n < 4 * P16 ? n / 4 * 512 + lane * 16 + n % 4 * 4 : n < 4 * P16 + 2 * P8 ? P16 * 512 + lane * 8 + (n - 4 * P16) * 4 : 32 * (CODE_BITS - 4) + 4 * lane;
    }
  }
  __device__ __forceinline__ void load(u32* r, const u8* tile) const {
    if (CODE_BITS == 64) load16(r, tile + at[0]);
    else if (CODE_BITS == 32) load8(r, tile + at[0]);
    else
      #pragma unroll
      for (int i = 0; i < LOADED; ++i) load4(r + i, tile + at[i]);
  }
  // to: of the tile, at place_of_step.
  __device__ __forceinline__ void decode(u8* to, const u32* loaded, u32 copy) const {
    u32 r[WORDS + 1], ends[2], v[4][4];
    #pragma unroll
    for (int i = 0; i < WORDS; ++i) r[i] = CODE_BITS % 16 ? __funnelshift_r(loaded[i], loaded[min(i + 1, LOADED - 1)], shift) : loaded[i];
    ends_of(ends, r, 0);
    #pragma unroll
    for (int m = 0; m < 4; ++m)
      #pragma unroll
      for (int e = 0; e < 4; ++e) v[m][e] = value(hash_of(r, ends, 0, m, e), copy);
    #pragma unroll
    for (int m = 0; m < 4; ++m)
      #pragma unroll
      for (int e = 0; e < 2; ++e) *(uint2*)(to + 2048 * m + 1024 * e) = make_uint2(v[m][e], v[m][e + 2]);
  }
};
