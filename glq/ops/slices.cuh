// How a warp decodes 16 rows of a tile of a trellis code, which lies in shared memory, into the operands of wgmma.
// Each of the four warps of a warpgroup has other 16 rows: of every word two pairs, and the bits after them that belong to
// the second one's state.

static constexpr int PAIR_BITS = CODE_BITS / 8;      // of the first of two pairs
static constexpr int WINDOW = PAIR_BITS + 16;        // bits in which both states lie
static constexpr int QUARTER = CODE_BITS / 4;        // bits of a word from one slice to the next

// A lane's codes of one tile, as load_codes.
__device__ __forceinline__ void take_codes(u32* r, const u8* tile, int lane) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  #pragma unroll
  for (int i = 0; i < P16; ++i) {
    const uint4 v = *(const uint4*)(tile + 512 * i + 16 * lane);
    r[4 * i] = v.x, r[4 * i + 1] = v.y, r[4 * i + 2] = v.z, r[4 * i + 3] = v.w;
  }
  if (P8) {
    const uint2 v = *(const uint2*)(tile + 512 * P16 + 8 * lane);
    r[4 * P16] = v.x, r[4 * P16 + 1] = v.y;
  }
  if (P4) r[REGS - 1] = *(const u32*)(tile + 32 * (CODE_BITS - 4) + 4 * lane);
}
// Word k of a lane from where slice M begins: WINDOW bits, and others above them.
template <int M> __device__ __forceinline__ u32 window(const u32* r, int k) {
  constexpr int OWN = QUARTER * (4 - M);  // bits up to the end of the word; those after it another lane has
  const int begin = CODE_BITS * k, at = begin + QUARTER * M, end = begin + CODE_BITS;
  if (OWN >= WINDOW) {
    const int i = at / 32, shift = at % 32;
    return shift + WINDOW <= 32 ? r[i] >> shift : __funnelshift_r(r[i], r[i + 1], shift);
  }
  const u32 next = __shfl_sync(~0u, bits16(r, begin), (threadIdx.x + 4) & 31);
  const u32 last = end < 32 ? r[0] << (32 - end) : end % 32 == 0 ? r[end / 32 - 1] : __funnelshift_r(r[end / 32 - 1], r[end / 32], end % 32);
  return __funnelshift_r(last, next, (32 - OWN) & 31);
}
template <int M> __device__ __forceinline__ void windows(u32* w, const u32* r) {
  #pragma unroll
  for (int k = 0; k < 8; ++k) w[k] = window<M>(r, k);
}
// Rows 16 slice … 16 slice + 15 of a tile: a[step of 16 columns][register of the fragment].
__device__ __forceinline__ void decode_slice(u32 (*a)[4], const u8* tile, int slice, u32 copy) {
  u32 r[REGS], w[8];
  take_codes(r, tile, threadIdx.x % 32);
  switch (slice) {  // the same for the whole warp
    case 0: windows<0>(w, r); break;
    case 1: windows<1>(w, r); break;
    case 2: windows<2>(w, r); break;
    default: windows<3>(w, r);
  }
  #pragma unroll
  for (int k = 0; k < 8; ++k) {
    const u32 low = w[k] >> PAIR_BITS;
    const u32 first = SIGNED ? w[k] : prmt(w[k], w[k], 0x1010);
    const u32 second = SIGNED ? low : PAIR_BITS == 8 ? prmt(w[k], w[k], 0x2121) : prmt(low, low, 0x1010);
    a[k / 2][k % 2 * 2] = value(first, copy);
    a[k / 2][k % 2 * 2 + 1] = value(second, copy);
  }
}
