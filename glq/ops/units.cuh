// What the kernels for few tokens have in common (decode.cu, experts.cu): runs of units, a warp's product with its tile, sums
// over the warps of a block.
// Macros, besides those of exchange.cuh and of tiles.cuh or lattice.cuh: NT (8 tokens each), BLOCK (of one_token.cuh), WR, WK: a unit is WR × WK tiles of 64 × 64, one a warp.
static constexpr int WARPS = WR * WK, THREADS = 32 * WARPS, ROWS = 64 * WR;

static_assert(128 * WARPS % ROWS == 0, "a thread's rows are the same of each token");
static constexpr int X_STRIDE = 72;    // halves a token takes in a tile of x: 64, and 8 that keep banks apart

// ---- which units a block has ----

// n / by, where n · by < 2^32. factor: ⌈2^32 / by⌉, or 0 where by is 1.
__device__ __forceinline__ int quotient(int n, u32 factor) { return factor ? (int)__umulhi(n, factor) : n; }

struct Work {
  int row_tiles, col_tiles, per_row, length, longer;  // the first `longer` blocks have length + 1 units, the others length

  __device__ __forceinline__ int begin(int block) const { return block * length + min(block, longer); }
  __device__ __forceinline__ int owner(int unit) const {
    return owner(unit, [&](int n) { return n / (length + 1); }, [&](int n) { return n / length; });
  }
  template <typename Longer, typename Shorter> __device__ __forceinline__ int owner(int unit, Longer by_longer, Shorter by_length) const {
    const int rest = unit - longer * (length + 1);
    return rest < 0 ? by_longer(unit) : longer + by_length(rest);
  }
};

// ---- the product ----

// acc[row tile][token tile][4] += the tile · x; xs: this lane's columns of its token, in halves. used(s): the codes of step
// s are.
template <typename F>
__device__ __forceinline__ void tile_product(float (*acc)[NT][4], const u32* r, const u16* xs, u32 copy, F used) {
  #pragma unroll
  for (int s = 0; s < 4; ++s) {
    u32 held[OF_STEP];
    begin_step(held, r, s);
    uint2 b[NT];
    #pragma unroll
    for (int n = 0; n < NT; ++n) b[n] = *(const uint2*)(xs + n * 8 * X_STRIDE + 4 * s);
    #pragma unroll
    for (int m = 0; m < 4; ++m) {
      u32 a[4];
      fragment(a, held, r, s, m, copy);
      #pragma unroll
      for (int n = 0; n < NT; ++n) mma(acc[m][n], a, b[n].x, b[n].y);
    }
    used(s);
  }
}

// ---- sums ----

// The sums that the block has of a group of rows, added up over its warps: put(token, row, 4 rows' sums).
// shared: [WARPS][8 tokens at once][64] floats, of which two tokens' rows are swapped by eights, to keep banks apart.
template <typename F> __device__ __forceinline__ void take_sums(float (*acc)[NT][4], float* shared, int tokens, int warp, F put) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, at_once = min(tokens, 8);
  #pragma unroll
  for (int n = 0; n < NT; ++n) {
    #pragma unroll
    for (int m = 0; m < 4; ++m)
      #pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * m + g + e / 2 * 8, token = 2 * t + e % 2;
        if (8 * n + token < tokens) shared[(warp * at_once + token) * 64 + (row ^ 8 * t)] = acc[m][n][e];
        acc[m][n][e] = 0;
      }
    __syncthreads();
    for (int i = 4 * threadIdx.x; i < ROWS * min(tokens - 8 * n, 8); i += 4 * THREADS) {
      const int row = i % ROWS, token = i / ROWS;
      float4 sum = {0, 0, 0, 0};
      #pragma unroll
      for (int k = 0; k < WK; ++k) add(sum, *(const float4*)(shared + ((row / 64 * WK + k) * at_once + token) * 64 + (row % 64 ^ token / 2 * 8)));
      put(8 * n + token, row, sum);
    }
    __syncthreads();
  }
}
// The same of what blocks from `first` on handed over, `slot` floats each, and own sums.
template <typename F> __device__ __forceinline__ void take_parts(float* handed, const float* own, int slot, int tokens, int first, F put) {
  #pragma unroll 1
  for (int i = 4 * threadIdx.x; i < ROWS * tokens; i += 4 * THREADS) {  // as take_sums gives them to the threads
    float4 sum = *(const float4*)(own + i);
    add_parts(sum, handed + first * slot + i, slot, blockIdx.x - first);
    put(i / ROWS, i % ROWS, sum);
  }
}
// The scales of the four rows that a thread has of each group of them, as take_sums gives them. first: where those of the matrix begin.
struct Scales {
  float of[4];

  // With one token they are asked for while warps still wait for each other; with more there are no registers for them.
  __device__ __forceinline__ Scales(const void* scale, int first, int row, int rows) {
    if (!BLOCK) return;
    row += 4 * threadIdx.x % ROWS;
    #pragma unroll
    for (int i = 0; i < 4; ++i) of[i] = row + i < rows ? load_scale(scale, first + row + i) : 0;
  }
};
// Four rows' sums, scaled, to y of one token.
__device__ __forceinline__ void put_rows(u16* y, const Scales& scales, const void* scale, int first, int row, int rows, float4 sum) {
  const float v[4] = {sum.x, sum.y, sum.z, sum.w};
  #pragma unroll
  for (int i = 0; i < 4; ++i) if (row + i < rows) y[row + i] = to16(v[i] * (BLOCK ? scales.of[i] : load_scale(scale, first + row + i)));
}
