// y = (R x) Vᵀ · scale for a few tokens, V in trellis codes: warps decode tiles of 64 × 64 straight into mma fragments.
//
// A unit is WR × WK tiles, one a warp: WR row tiles side by side, WK column tiles. Units in row-major order are cut into
// as many runs as there are blocks. A block sums a run in registers, and adds up in shared memory what the WK warps of a row
// have. Where a run ends inside a group of rows, its part goes to the block that has the group's end (exchange.cuh), which
// always adds up in the same order.
// Macros, besides those of one_token.cuh: FAR (units whose codes are requested into the L2 cache ahead of their loads).

// Threads beside these that registers are left for: those of the next rotation, which can start early.
static constexpr int ROOM = __CUDA_ARCH__ >= 900 && NT <= 4 && !BLOCK ? 32 : 0;

// A warp's tiles, unit after unit.
struct Cursor {
  const u8* tile;
  int row, col, left;  // units until the end of the run

  __device__ Cursor(const Work& work, const u8* codes, int unit, int end, int wr, int wk)
      : row(unit / work.per_row * WR + wr), col(unit % work.per_row * WK + wk), left(end - unit) {
    tile = codes + (size_t)(row * work.col_tiles + col) * TILE_BYTES;
  }
  __device__ __forceinline__ bool is_tile(const Work& work) const {
    return left > 0 && row < work.row_tiles && col < work.col_tiles;
  }
  __device__ __forceinline__ void advance(const Work& work) {
    --left;
    col += WK;
    tile += WK * TILE_BYTES;
    if (col < work.per_row * WK) return;
    const int skipped = work.per_row * WK - work.col_tiles;  // tiles that the last unit of a row lacks
    col -= work.per_row * WK;
    row += WR;
    tile += (long long)((WR - 1) * work.col_tiles - skipped) * TILE_BYTES;
  }
};

// ---- x ----

// By the whole block; counted as one group.
__device__ __forceinline__ void copy_async(u8* to, const u8* from, int bytes) {
  #pragma unroll 1
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * THREADS) copy16_async(to + i, from + i);
  commit_async();
}

// x: what INPUT says, [cols], where BLOCK > 0, else [column tiles][tokens, beyond 8 filled up to 8 NT][72], rotated. handed, own: [grid][tokens][ROWS];
// handed is EMPTY, and is so again at the end.
extern "C" __global__ void __launch_bounds__(THREADS + ROOM, 1)
decode(const u8* codes, const u16* x, const u16* other, const u16* weight, u16* total, const u8* signs, const u32* table, const void* scale, u16* y, float* handed, float* own,
       int eps, int stride, int tokens, int rows, int cols, int row_tiles, int col_tiles, int length, int longer) {
  extern __shared__ __align__(128) u8 memory[];
  let_next_start();
  if (refuses(memory, y, (size_t)tokens * rows)) return;
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4, wr = warp / WK, wk = warp % WK;
  const Work work{row_tiles, col_tiles, (col_tiles + WK - 1) / WK, length, longer};
  auto put = [&](int token, int row, const Scales& scales, float4 sum) { put_rows(y + (size_t)token * rows, scales, scale, 0, row, rows, sum); };
  const int begin = work.begin(blockIdx.x), end = work.begin(blockIdx.x + 1), slot = ROWS * tokens;
  const int held = NT == 1 ? tokens : 8 * NT;  // tokens in a tile of x
  float* const sums = (float*)(memory + (SPREAD ? HOLE : TABLE_BYTES));  // of take_sums; scratch of the rotation
  u8* const xs = SPREAD ? memory + 3 * HOLE : (u8*)(sums + max(WARPS * min(tokens, 8) * 64, SCRATCH));

  Cursor ahead(work, codes, begin, end, wr, wk);
  u32 now[REGS];
  bool is_tile = ahead.is_tile(work);
  if (is_tile) load_codes(now, ahead.tile, lane);
  ahead.advance(work);
  Cursor far = ahead;
  auto request_far = [&] {
    if (FAR && far.is_tile(work) && lane < TILE_BYTES / 128) request_to_l2(far.tile + 128 * lane);
    far.advance(work);
  };
  #pragma unroll 1
  for (int i = 0; i < FAR; ++i) request_far();
  fill_table(memory, table, THREADS);
  int group = begin / work.per_row, ku = begin - group * work.per_row;
  const int head = group, shared_from = work.owner(head * work.per_row);  // the first block that has a part of the head
  if (NT == 1) request_scales(scale, head * ROWS, min(((end - 1) / work.per_row + 1) * ROWS, rows) - head * ROWS);
#if BLOCK
  rotate_for(work, begin, end, (u16*)xs, sums, Input(x, other, weight, total, eps, stride, 0, cols), signs, cols);
#else
  wait_for_previous();
  const int next_stage = SPREAD ? 2 * HOLE : WK * held * X_STRIDE * 2;
  auto stage = [&](int unit, int col) {  // x of a unit on its way to shared memory
    copy_async(xs + (unit - begin) % 2 * next_stage, (const u8*)x + (size_t)col * held * X_STRIDE * 2, min(WK, col_tiles - col) * held * X_STRIDE * 2);
  };
  stage(begin, ku * WK);
  __syncthreads();  // the table
#endif
  const u32 copy = own_copy();
  float acc[4][NT][4];
  #pragma unroll
  for (int i = 0; i < 4 * NT * 4; ++i) (&acc[0][0][0])[i] = 0;

  bool later = false;
  for (int unit = begin; unit < end; ++group, ku = 0) {
    for (const int stop = min(end, unit - ku + work.per_row); unit < stop; ++unit, ++ku) {
#if BLOCK
      const u16* const mine = (const u16*)xs + (ku * WK + wk) * 64 + 16 * t;
#else
      wait_async();
      __syncthreads();
      if (unit + 1 < end) stage(unit + 1, (ku + 1 < work.per_row ? ku + 1 : 0) * WK);
      const u16* const mine = (const u16*)(xs + (unit - begin) % 2 * next_stage) + (wk * held + min(g, held - 1)) * X_STRIDE + 16 * t;
#endif
      const bool more = ahead.is_tile(work);
      if (is_tile) tile_product(acc, now, mine, copy, [&](int s) { if (more) load_used(now, ahead.tile, lane, s); });
      else if (more) load_codes(now, ahead.tile, lane);
      is_tile = more;
      ahead.advance(work);
      if (FAR) request_far();
    }
    const bool ends = ku == work.per_row, begins = group > head || shared_from == blockIdx.x;
    later |= ends && !begins;
    const Scales scales(scale, 0, group * ROWS, rows);
    take_sums(acc, sums, tokens, warp, [&](int token, int row, float4 sum) {
      const int at = blockIdx.x * slot + token * ROWS + row;
      if (!ends) hand_over(handed + at, sum);
      else if (begins) put(token, group * ROWS + row, scales, sum);
      else *(float4*)(own + at) = sum;
    });
  }
  if (!later) return;
  const Scales scales(scale, 0, head * ROWS, rows);
  take_parts(handed, own + blockIdx.x * slot, slot, tokens, shared_from, [&](int token, int row, float4 sum) { put(token, head * ROWS + row, scales, sum); });
}
