// y = x Vᵀ · scale for many tokens on Hopper: x comes rotated, V in trellis codes, which go straight into the operands of wgmma.
//
// A block makes 256 rows × TOKENS tokens with two warpgroups. A warp decodes its own row tile of 64, of which the first
// warpgroup has rows 0 … 31, the second one rows 32 … 63. Tiles of x come through a ring of STAGES.
// Macros, besides those of tiles.cuh: TOKENS (64 or 128), STAGES.

static constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 256;
static constexpr int STAGE = TOKENS * 128;   // bytes of a tile of x
static constexpr int OUT_STRIDE = ROWS + 8;  // halves a token takes on its way out

struct Ring {
  u8* stages;
  u64 *full, *empty;
  const u16* x;  // the block's tokens in the first column tile
  size_t step;   // halves from one column tile to the next
  int tiles;

  __device__ __forceinline__ void request(int tile) const {  // by one thread
    if (tile < tiles) copy_bulk(stages + tile % STAGES * STAGE, x + tile * step, STAGE, full + tile % STAGES);
  }
};

// acc[m] += rows 16 (FIRST + m) … of the warp's row tile, all columns. While one warpgroup's products run, the other one decodes.
template <int FIRST> __device__ __forceinline__ void multiply_row(float (*acc)[TOKENS / 2], const u8* tile, const Ring& ring, u32 table, int lane) {
  u32 now[REGS], next[REGS], a[4][2][4];
  load_codes(now, tile, lane);
  for (int c = 0; c < ring.tiles; ++c) {
    if (c + 1 < ring.tiles) load_codes(next, tile + (size_t)(c + 1) * TILE_BYTES, lane);
    #pragma unroll
    for (int s = 0; s < 4; ++s) {
      u32 ends[2];
      ends_of(ends, now, s);
      #pragma unroll
      for (int i = 0; i < 8; ++i) a[s][i / 4][i % 4] = value(state_of(now, ends, s, FIRST + i / 4, i % 4), table);
    }
    await(ring.full + c % STAGES, c / STAGES & 1);
    const u32 at = shared_address(ring.stages + c % STAGES * STAGE);
    begin_products();
    #pragma unroll
    for (int s = 0; s < 4; ++s)
      #pragma unroll
      for (int m = 0; m < 2; ++m) multiply(acc[m], a[s][m], describe(at, 16 * s));
    commit_products();
    #pragma unroll
    for (int i = 0; i < REGS; ++i) now[i] = next[i];
    await_products<0>();
    if (lane == 0) arrive(ring.empty + c % STAGES);
    if (threadIdx.x == 0 && c > 0) {  // the other warps are done with the tile before, or nearly
      await(ring.empty + (c - 1) % STAGES, (c - 1) / STAGES & 1);
      ring.request(c - 1 + STAGES);
    }
  }
}

// x [column tiles][padded tokens][64], chunks of 16 bytes swizzled, columns in the order of the fragments; codes, scale and y
// as in decode.cu. A grid of token blocks × row blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
prefill(const u8* codes, const u16* x, const u32* table, const void* scale, u16* y, int tokens, int padded, int rows, int row_tiles, int col_tiles) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  u32* const entries = (u32*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_token = blockIdx.x * TOKENS, first_tile = blockIdx.y * 4;
  let_next_start();
  fill_table(entries, table, THREADS);
  const Ring ring{memory, full, empty, x + (size_t)first_token * 64, (size_t)padded * 64, col_tiles};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(full + i, 1);
      init_barrier(empty + i, WARPS);
    }
    publish_barriers();
    wait_for_previous();
    for (int i = 0; i < STAGES; ++i) ring.request(i);
  }
  __syncthreads();
  const int half = warp / 4, row_tile = min(first_tile + warp % 4, row_tiles - 1);
  const u8* const tile = codes + (size_t)row_tile * col_tiles * TILE_BYTES;
  const u32 values = address_table(entries);
  float acc[2][TOKENS / 2];
  #pragma unroll
  for (int i = 0; i < TOKENS; ++i) (&acc[0][0])[i] = 0;
  if (half == 0) multiply_row<0>(acc, tile, ring, values, lane);
  else multiply_row<2>(acc, tile, ring, values, lane);

  __syncthreads();  // the last stages are read, too: out through their memory
  u16* const out = (u16*)memory;
  #pragma unroll
  for (int m = 0; m < 2; ++m)
    #pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
      const int row = warp % 4 * 64 + 16 * (2 * half + m) + g + i / 2 % 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
      const int at = first_tile * 64 + row;
      out[token * OUT_STRIDE + row] = to16(at < rows ? acc[m][i] * load_scale(scale, at) : 0);
    }
  __syncthreads();
  wait_for_previous();
  const int columns = min(ROWS, rows - first_tile * 64), last = min(TOKENS, tokens - first_token);
  for (int token = warp; token < last; token += WARPS)
    for (int row = lane; row < columns; row += 32) y[(size_t)(first_token + token) * rows + first_tile * 64 + row] = out[token * OUT_STRIDE + row];
}
