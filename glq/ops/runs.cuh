// What the kernels for many tokens have in common (prefill.cu, wide.cu): runs of units, and sums of a tile of y in registers.
//
// A tile of y is 64 rows a warpgroup × TOKENS tokens; a unit is one step of it, 64 columns. Units, tile after tile, are cut
// into as many equal runs as there are blocks.
// Where several blocks have units of one tile, the one with its first unit adds up what they have (exchange.cuh), always in
// the same order. The first blocks have the last runs: so each hands over what is needed elsewhere before anything else, and
// a tile whose sums come from others, which are blocks before it, is its last.
// Macros, besides those of exchange.cuh and tiles.cuh: TOKENS, WARPGROUPS (the first ones of a block; they have the sums).

static constexpr int ROWS = 64 * WARPGROUPS, SLOT = ROWS * TOKENS;  // floats of a tile's sums

// ---- which units a run has ----

struct Work {
  int units, row_tiles, col_tiles, token_blocks;

  __device__ Work(int row_tiles, int col_tiles, int token_blocks) : row_tiles(row_tiles), col_tiles(col_tiles), token_blocks(token_blocks) {
    units = (row_tiles + WARPGROUPS - 1) / WARPGROUPS * token_blocks * col_tiles;
  }
  __device__ int begin(int run) const { return (int)((long long)units * run / (int)gridDim.x); }
  __device__ int owner(int unit) const { return (int)(((long long)(unit + 1) * (int)gridDim.x - 1) / units); }
  __device__ int row_tile(int tile) const { return tile / token_blocks * WARPGROUPS; }  // the first one
};
__device__ __forceinline__ int own_run() { return gridDim.x - 1 - blockIdx.x; }

// ---- sums ----

struct Output {
  u16* y;
  const void* scale;
  int tokens, rows;

  // What a warp has of rows from `row` on and tokens from `token` on.
  __device__ __forceinline__ void put(const float* acc, int row, int token) const {
    const int lane = threadIdx.x % 32, g = lane / 4, at = row + 2 * (lane % 4);
    const float low = row + g < rows ? load_scale(scale, row + g) : 0, high = row + 8 + g < rows ? load_scale(scale, row + 8 + g) : 0;
    #pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i) {
      const u32 first = transpose(to16(acc[4 * i] * low) | (u32)to16(acc[4 * i + 1] * low) << 16);
      const u32 second = transpose(to16(acc[4 * i + 2] * high) | (u32)to16(acc[4 * i + 3] * high) << 16);
      if (token + 8 * i + g < tokens) {
        u16* const to = y + (size_t)(token + 8 * i + g) * rows;
        put2(to, at, first);
        put2(to, at + 8, second);
      }
    }
  }
  __device__ __forceinline__ void put2(u16* to, int row, u32 pair) const {
    if (rows % 2 == 0) {
      if (row < rows) *(u32*)(to + row) = pair;
    } else {
      if (row < rows) to[row] = (u16)pair;
      if (row + 1 < rows) to[row + 1] = (u16)(pair >> 16);
    }
  }
};
// Where a thread's sums lie in what blocks hand over: all have the same ones of a tile.
__device__ __forceinline__ int place_in_slot() { return threadIdx.x / 128 * 64 * TOKENS + threadIdx.x % 128 * 4; }
__device__ __forceinline__ void hand_over_all(const float* acc, float* slot) {
  #pragma unroll
  for (int i = 0; i < TOKENS / 8; ++i) hand_over(slot + place_in_slot() + 512 * i, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
}
// acc += what other blocks hand over, of the runs from `first` to `last`.
__device__ __forceinline__ void add_up(float* acc, float* handed, int first, int last) {
  constexpr int AT_ONCE = TOKENS < 32 || TOKENS == 128 ? 2 : 4;
  static_assert(TOKENS / 8 % AT_ONCE == 0, "all of a thread's sums");
  #pragma unroll 1
  for (int run = first; run <= last; ++run) {
    float* const from = handed + (size_t)run * SLOT + place_in_slot();
    #pragma unroll
    for (int i = 0; i < TOKENS / 8; i += AT_ONCE) {
      float4 v[AT_ONCE];
      take_over(v, from + 512 * i, 512);
      #pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        float* const to = acc + 4 * (i + j);
        to[0] += v[j].x, to[1] += v[j].y, to[2] += v[j].z, to[3] += v[j].w;
      }
    }
  }
  __syncwarp();
}
// What a warpgroup has of units `unit` … stop − 1, all of one tile: to y, with what others have of it, or to who has the first one.
__device__ __forceinline__ void finish_tile(float* acc, const Work& work, const Output& out, float* handed, int unit, int stop) {
  const int run = own_run(), tile = unit / work.col_tiles, begin = tile * work.col_tiles, end = begin + work.col_tiles;
  if (unit > begin) {
    hand_over_all(acc, handed + (size_t)run * SLOT);
    return;
  }
  if (stop < end) add_up(acc, handed, run + 1, work.owner(end - 1));
  out.put(acc, work.row_tile(tile) * 64 + threadIdx.x / 32 * 16, tile % work.token_blocks * TOKENS);
}
