// How a warp decodes a slice of a tile of a trellis code, 16 of its 64 rows, into mma fragments. All slices take the same
// instructions, since a word's strip is moved by those of the slices before.

static constexpr int MOVED = CODE_BITS / 4;  // bits of a word that a slice has

// Words that begin at any bit, apart: word i of a lane's string.
__device__ __forceinline__ uint2 word_of(const u32* r, int i) {
  u32 w[2];
  #pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int at = CODE_BITS * i + 32 * j, left = CODE_BITS - 32 * j;
    if (left <= 0) w[j] = 0;
    else w[j] = __funnelshift_r(r[at / 32], r[min(at / 32 + 1, REGS - 1)], at % 32) & (left < 32 ? (1u << left % 32) - 1 : ~0u);
  }
  return make_uint2(w[0], w[1]);
}
// Register e of the fragment of step s, of words that begin with the slice.
__device__ __forceinline__ u32 pair_of(const u32* word, int e, u32 copy) {
  const int at = CODE_BITS * (e % 2) / 8;
  return value(SIGNED ? bits16(word, at) : twice(word, at), copy);
}

// What a warp that decodes one slice needs: the first 32 bits of each word from there on.
struct Slice {
  u32 w[8];

  __device__ __forceinline__ void take(const u32* r, int slice) {
    const int moved = MOVED * slice;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 word = word_of(r, i);
      const u32 next = __shfl_sync(~0u, word.x, (threadIdx.x + 4) & 31);  // of the next row, where the strip goes on
      const unsigned long long two = (unsigned long long)word.y << 32 | word.x | (CODE_BITS < 64 ? (unsigned long long)next << CODE_BITS % 64 : 0);
      const u32 low = (u32)two, high = (u32)(two >> 32), after = CODE_BITS > 32 ? next >> (64 - CODE_BITS) % 32 : 0;
      w[i] = MOVED * 3 < 32 || moved < 32 ? __funnelshift_r(low, high, moved) : __funnelshift_r(high, after, moved);
    }
  }
  __device__ __forceinline__ u32 pair(int s, int e, u32 copy) const { return pair_of(w + 2 * s + e / 2, e, copy); }
};

// What a warp that decodes one slice after the other needs: all of its words.
struct Words {
  u32 w[8][2];  // first, as load_codes has them

  __device__ __forceinline__ void load(const u8* tile, int lane) { load_codes(w[0], tile, lane); }
  __device__ __forceinline__ void separate() {
    u32 r[REGS];
    #pragma unroll
    for (int i = 0; i < REGS; ++i) r[i] = w[i / 2][i % 2];
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 word = word_of(r, i);
      w[i][0] = word.x, w[i][1] = word.y;
    }
  }
  __device__ __forceinline__ void move_on() {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 next = __shfl_sync(~0u, w[i][0], (threadIdx.x + 4) & 31) & ((1u << MOVED) - 1);  // of the next row
      const unsigned long long moved = ((unsigned long long)w[i][1] << 32 | w[i][0]) >> MOVED | (unsigned long long)next << (CODE_BITS - MOVED);
      w[i][0] = (u32)moved;
      w[i][1] = (u32)(moved >> 32);
    }
  }
  __device__ __forceinline__ u32 pair(int s, int e, u32 copy) const { return pair_of(w[2 * s + e / 2], e, copy); }
};
