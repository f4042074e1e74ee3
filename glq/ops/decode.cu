// y = (R x) Vᵀ · scale for a few tokens, V in trellis codes: warps decode tiles of 64 × 64 straight into mma fragments.
//
// A unit is WR × WK tiles, one a warp: WR row tiles side by side, WK column tiles. Units in row-major order are cut into
// as many equal runs as there are blocks. A block sums a run in registers; what the WK warps of a row have is added up in
// shared memory, what the blocks of a row have in global memory, by the last block to arrive, always in the same order.
// Macros, besides those of tiles.cuh: NT (8 tokens each), WR, WK, BLOCK (width of the rotation, for
// one token; 0: x comes rotated, in tiles), EARLY (codes are requested before the kernel ahead is done).
static constexpr int WARPS = WR * WK, THREADS = 32 * WARPS;

static constexpr int X_STRIDE = 72;  // halves a token takes in a tile of x: 64, and 8 that keep banks apart

// ---- x ----

#if BLOCK
// One token into shared memory, in the order of its columns; of its chunks of 256 columns those from first to end, which are
// whole blocks of the rotation. scratch: 256 floats a warp.
__device__ void rotate(u16* xs, float* scratch, const u16* x, const u8* signs, int first, int end) {
  constexpr int CHUNKS = BLOCK / 256, AT_ONCE = WARPS / CHUNKS * CHUNKS;
  static_assert(BLOCK % 256 == 0 && AT_ONCE > 0, "a block takes a whole number of warps");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int start = first; start < end; start += AT_ONCE) {
    const int col = (start + warp) * 256 + 8 * lane;
    const bool mine = warp < AT_ONCE && start + warp < end;
    float v[8];
    if (mine) {
      load_signed(v, x, signs, col);
      hadamard256(v, lane);
      leave(v, scratch + 256 * warp, lane);
    }
    __syncthreads();
    if (mine) {
      gather(v, scratch + 256 * (warp / CHUNKS * CHUNKS), CHUNKS, warp % CHUNKS, lane);
      *(uint4*)(xs + col) = pack8(v, rsqrtf((float)BLOCK));
    }
    __syncthreads();
  }
}
#endif
// By the whole block; counted as one group.
__device__ __forceinline__ void copy_async(u8* to, const u8* from, int bytes) {
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * THREADS) copy16_async(to + i, from + i);
  commit_async();
}

// ---- the product ----

// acc[row tile][token tile][4] += the tile · x; xs: this lane's columns of its token, in halves.
__device__ __forceinline__ void tile_product(float (*acc)[NT][4], const u32* r, const u16* xs, int token_stride, u32 table) {
  #pragma unroll
  for (int s = 0; s < 4; ++s) {
    u32 ends[2];
    ends_of(ends, r, s);
    uint2 b[NT];
    #pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = *(const uint2*)(xs + n * token_stride + 4 * s);
    #pragma unroll
    for (int m = 0; m < 4; ++m) {
      u32 a[4];
      #pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = value(state_of(r, ends, s, m, e), table);
      #pragma unroll
      for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n].x, b[n].y);
    }
  }
}

struct Work {  // which units a block has
  int grid, units, per_row;
  __device__ int begin(int block) const { return (int)((long long)units * block / grid); }
  __device__ int owner(int unit) const { return (int)(((long long)(unit + 1) * grid - 1) / units); }
};

// x: [cols] where BLOCK > 0, else [column tiles][tokens, beyond 8 filled up to 8 NT][72]. partial: [grid][2][WR · 64 · tokens]; tickets: [row groups] zeros, which
// they are again at the end.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(const u8* codes, const u16* x, const u8* signs, const u16* table, const void* scale, u16* y, float* partial, u32* tickets,
       int tokens, int rows, int cols, int row_tiles, int col_tiles) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ bool last;
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, wr = warp / WK, wk = warp % WK;
  const Work work{(int)gridDim.x, ((row_tiles + WR - 1) / WR) * ((col_tiles + WK - 1) / WK), (col_tiles + WK - 1) / WK};
  const int begin = work.begin(blockIdx.x), end = work.begin(blockIdx.x + 1);
  const int sums = 64 * tokens;                               // of one row tile
  u32* const entries = (u32*)memory;
  float* const shared_sums = (float*)(memory + (STRIDE << TABLE_BITS));                  // [WARPS][64 · tokens] if WK > 1; scratch of the rotation
  constexpr int SCRATCH = BLOCK ? 256 * WARPS : 0;
  u8* const xs = (u8*)(shared_sums + (WK > 1 ? max(WARPS * sums, SCRATCH) : SCRATCH));
  const int held = NT == 1 ? tokens : 8 * NT;               // tokens in a tile of x
  const int chunk_bytes = WK * held * X_STRIDE * 2;

  auto tile_of = [&](int unit) -> const u8* {  // of this warp; null where it has none
    const int row = unit / work.per_row * WR + wr, col = unit % work.per_row * WK + wk;
    return row < row_tiles && col < col_tiles ? codes + (size_t)(row * col_tiles + col) * TILE_BYTES : nullptr;
  };
  auto stage = [&](int unit) {  // x of a unit on its way to shared memory
#if !BLOCK
    const int col = unit % work.per_row * WK;
    copy_async(xs + (unit - begin) % 2 * chunk_bytes, (const u8*)x + (size_t)col * held * X_STRIDE * 2, min(WK, col_tiles - col) * held * X_STRIDE * 2);
#endif
  };
  u32 now[REGS], next[REGS];
  auto request = [&](u32* r, int unit) { if (unit < end) { const u8* tile = tile_of(unit); if (tile) load_codes(r, tile, lane); } };
#if EARLY
  request(now, begin);
  request(next, begin + 1);
#endif
  for (int i = threadIdx.x; i < COPIES << TABLE_BITS; i += THREADS) entries[i] = ((const u32*)table)[i / COPIES];
  wait_for_previous();
#if !EARLY
  request(now, begin);
  request(next, begin + 1);
#endif
#if BLOCK
  {
    // only the columns that the run has, in whole blocks of the rotation
    constexpr int CHUNKS = BLOCK / 256;
    const int chunks = cols / 256, one = end - begin < work.per_row && begin % work.per_row < (end - 1) % work.per_row + 1 && begin / work.per_row == (end - 1) / work.per_row;
    const int from = one ? begin % work.per_row * WK * 64 / BLOCK * CHUNKS : 0;
    const int to = one ? min(chunks, (((end - 1) % work.per_row + 1) * WK * 64 + BLOCK - 1) / BLOCK * CHUNKS) : chunks;
    rotate((u16*)xs, shared_sums, x, signs, from, to);
  }
#else
  stage(begin);
#endif
  __syncthreads();
  const u32 base = shared_address(entries) + 4 * (lane % COPIES);
  float acc[4][NT][4];
  #pragma unroll
  for (int i = 0; i < 4 * NT * 4; ++i) (&acc[0][0][0])[i] = 0;
  for (int unit = begin; unit < end; ++unit) {
    const int group = unit / work.per_row, ku = unit % work.per_row;
#if BLOCK
    const u16* const mine = (const u16*)xs + (ku * WK + wk) * 64 + 16 * t;
    constexpr int token_stride = 0;
#else
    wait_async();
    __syncthreads();
    if (unit + 1 < end) stage(unit + 1);
    constexpr int token_stride = 8 * X_STRIDE;
    const u16* const mine = (const u16*)(xs + (unit - begin) % 2 * chunk_bytes) + (wk * held + min(g, held - 1)) * X_STRIDE + 16 * t;
#endif
    if (tile_of(unit)) tile_product(acc, now, mine, token_stride, base);
    #pragma unroll
    for (int i = 0; i < REGS; ++i) now[i] = next[i];
    request(next, unit + 2);
    if (ku + 1 < work.per_row && unit + 1 < end) continue;

    // the end of a row of tiles, or of the run
    const int first_block = work.owner(group * work.per_row), last_block = work.owner((group + 1) * work.per_row - 1);
    const bool whole = first_block == last_block;
    const int slot = group == begin / work.per_row ? 0 : 1;
    float* const out = partial + ((size_t)blockIdx.x * 2 + slot) * WR * sums;
    auto finish = [&](int row, int token, float sum) {  // row of the group
      const int at = group * WR * 64 + row;
      if (at < rows) y[(size_t)token * rows + at] = to16(sum * load_scale(scale, at));
    };
    #pragma unroll
    for (int m = 0; m < 4; ++m)
      #pragma unroll
      for (int n = 0; n < NT; ++n)
        #pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * m + g + e / 2 * 8, token = 8 * n + 2 * t + e % 2;
          if (token < tokens) {
            if (WK > 1) shared_sums[warp * sums + row * tokens + token] = acc[m][n][e];
            else if (whole) finish(wr * 64 + row, token, acc[m][n][e]);
            else out[wr * sums + row * tokens + token] = acc[m][n][e];
          }
          acc[m][n][e] = 0;
        }
    if (WK > 1) {
      __syncthreads();
      for (int i = threadIdx.x; i < WR * sums; i += THREADS) {
        const int w = i / sums, at = i % sums;
        float sum = 0;
        #pragma unroll
        for (int k = 0; k < WK; ++k) sum += shared_sums[(w * WK + k) * sums + at];
        if (whole) finish(w * 64 + at / tokens, at % tokens, sum);
        else out[i] = sum;
      }
      __syncthreads();
    }
    if (whole) continue;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(tickets + group, 1) == (u32)(last_block - first_block);
      if (last) tickets[group] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!last) continue;
    for (int i = threadIdx.x; i < WR * sums; i += THREADS) {
      float sum = 0;
      for (int b = first_block; b <= last_block; ++b) {
        const int s = group == work.begin(b) / work.per_row ? 0 : 1;
        sum += __ldcg(partial + ((size_t)b * 2 + s) * WR * sums + i);
      }
      finish(i / tokens, i % tokens, sum);
    }
  }
}
