// y = (R x) Vᵀ · scale for a few tokens, V in codes: warps decode tiles of 64 × 64 straight into mma fragments.
//
// A unit is WR × WK tiles, one a warp: WR row tiles side by side, WK column tiles. Units in row-major order are cut into
// as many runs as there are blocks. A block sums a run in registers, and adds up in shared memory what the WK warps of a row
// have. Where a run ends inside a group of rows, its part goes to the block that has the group's end (exchange.cuh), which
// always adds up in the same order.
// Macros, besides those of one_token.cuh: FAR (units whose codes are requested into the L2 cache ahead of their loads); PACKED, if BLOCK > 0: whether a block has the
// columns of x that its run needs side by side. That run is so much shorter than a row that none of them is needed twice.

// Threads beside these that registers are left for: those of the next rotation, which can start early. (Lattices have none to leave on later GPUs, and with 9 to
// 16 tokens trellis-2.75 lacks one.)
static constexpr int ROOM = __CUDA_ARCH__ >= 900 && NT <= 4 && !BLOCK && !(NT == 2 && CODE_BITS == 44) && (TALL == 1 || __CUDA_ARCH__ == 900) ? 32 : 0;

// ---- x ----

// By the whole block; counted as one group.
__device__ __forceinline__ void copy_async(u8* to, const u8* from, int bytes) {
  #pragma unroll 1
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * THREADS) copy16_async(to + i, from + i);
  commit_async();
}

// x: what INPUT says, [cols], where BLOCK > 0, else [column tiles][tokens, beyond 8 filled up to 8 NT][72], rotated. handed, own: [grid][tokens][ROWS];
// handed is EMPTY, and is so again at the end. by_row, by_length, by_longer: factors of quotient for units of a row, and of a block.
extern "C" __global__ void __launch_bounds__(THREADS + ROOM, 1)
decode(const u8* codes, const u16* x, const u16* other, const u16* weight, u16* total, const u8* signs, const u32* table, const void* scale, u16* y, float* handed, float* own,
       int eps, int stride, int tokens, int rows, int cols, int row_tiles, int col_tiles, int length, int longer,
       u32 by_row, u32 by_length, u32 by_longer) {
  extern __shared__ __align__(128) u8 memory[];
  let_next_start();
  if (refuses(memory, y, (size_t)tokens * rows)) return;
  constexpr int FILLERS = 32 * (BLOCK ? WARPS / 2 : WARPS);  // threads
  Filler<FILLERS> filler(table);  // ahead of codes, which fill the way from memory
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4, wr = warp / WK, wk = warp % WK;
  const Work work{row_tiles, col_tiles, (col_tiles + WK - 1) / WK, length, longer};
  auto put = [&](int token, int row, const Scales& scales, float4 sum) { put_rows(y + (size_t)token * rows, scales, scale, 0, row, rows, sum); };
  const int begin = work.begin(blockIdx.x), end = work.begin(blockIdx.x + 1), slot = ROWS * tokens;
  const int held = NT == 1 ? tokens : 8 * NT;  // tokens in a tile of x
  float* const sums = (float*)(memory + (SPREAD ? HOLE : TABLE_BYTES));  // of take_sums; scratch of the rotation
  u8* const xs = SPREAD ? memory + 3 * HOLE : (u8*)(sums + max(WARPS * min(tokens, 8) * 64, SCRATCH));

  // A warp's tiles, unit after unit, one unit ahead of its products: `at` is this lane's share of the codes, `next` the unit's number in its row.
  const int per_row = work.per_row, own_cols = (col_tiles - wk + WK - 1) / WK;           // units of a row of which the warp has a tile
  const int own_end = min(end, (row_tiles - wr + WR - 1) / WR * per_row);                // beyond it the warp has no rows
  const long long jump = (long long)(TALL * WR * col_tiles - per_row * WK) * TILE_BYTES;  // to the next rows
  auto has = [&](int unit, int ku) { return unit < own_end && ku < own_cols; };
  int group = quotient(begin, by_row), ku = begin - group * per_row, next = ku;
  const Loader loader(codes, rows, col_tiles);
  const u8* at = codes + ((size_t)(TALL * (group * WR + wr)) * col_tiles + ku * WK + wk) * TILE_BYTES + 16 * lane;
  auto step = [&] {
    at += WK * TILE_BYTES;
    if (++next == per_row) next = 0, at += jump;
    hold(at);
  };
  auto request_far = [&](int unit, int distance) {  // which is so many units beyond `at`
    int far = next + distance;
    const long long over = far >= per_row ? jump : 0;
    if (far >= per_row) far -= per_row;
    if (lane < TILE_BYTES / 128 && has(unit, far)) request_to_l2(at + distance * WK * TILE_BYTES + over + 112 * lane);
  };
  u32 now[REGS];
  bool is_tile = has(begin, ku);
  auto load_first = [&] {
    if (is_tile) loader.load(now, at - 16 * lane, lane);
    step();
  };
  // Where the table is filled and x rotated first, codes go as far as to the L2 cache: loads that wait for memory would hold up all others.
  if (!BLOCK) load_first();
  #pragma unroll 1
  for (int i = 0; i < FAR + (BLOCK > 0); ++i) request_far(begin + (BLOCK == 0) + i, i);
  const int head = group;
  auto make_ready = [&] {
    filler.fill(memory);
    if (NT == 1) request_scales(scale, head * ROWS, min((quotient(end - 1, by_row) + 1) * ROWS, rows) - head * ROWS, FILLERS);
  };
#if BLOCK
  rotate_for<FILLERS / 32, PACKED>(work, ku, end - begin, (u16*)xs, sums, Input(x, other, weight, total, eps, stride, 0, cols), signs, cols, make_ready, load_first);
#else
  make_ready();
  wait_for_previous();
  const int next_stage = SPREAD ? 2 * HOLE : WK * held * X_STRIDE * 2;
  auto stage = [&](int ku, int to) {  // x of a unit on its way to shared memory
    copy_async(xs + to, (const u8*)x + (size_t)(ku * WK) * held * X_STRIDE * 2, min(WK, col_tiles - ku * WK) * held * X_STRIDE * 2);
  };
  stage(ku, 0);
  int from = 0;  // where the unit's x lies
  __syncthreads();  // the table
#endif
  // The first block that has a part of the head.
  const int shared_from = work.owner(head * per_row, [&](int n) { return quotient(n, by_longer); }, [&](int n) { return quotient(n, by_length); });
  const u32 copy = own_copy();
  float acc[4][NT][4];
  #pragma unroll
  for (int i = 0; i < 4 * NT * 4; ++i) (&acc[0][0][0])[i] = 0;

#if BLOCK
  u32 row_x = shared_address(xs) - (PACKED ? 512 * first_chunk(ku) : 0);  // where a row's x would begin
#endif
  bool later = false;
  for (int unit = begin; unit < end; ++group, ku = 0) {
    const int row_end = unit - ku + per_row, stop = min(end, row_end);
#if BLOCK
    u32 own_x = row_x + 128 * (ku * WK + wk) + 32 * t;
    if (PACKED) row_x += 2 * cols;
#else
    const u32 own_x = shared_address(xs) + (wk * held + min(g, held - 1)) * X_STRIDE * 2 + 32 * t;
#endif
    #pragma unroll 1
    for (; unit < stop; ++unit) {
#if BLOCK
      const u16* const mine = in_shared<u16>(own_x);
      own_x += 128 * WK;
#else
      wait_async();
      __syncthreads();
      if (unit + 1 < end) stage(next, next_stage - from);
      const u16* const mine = in_shared<u16>(own_x + from);
      from = next_stage - from;
#endif
      const bool more = has(unit + 1, next);
      if (is_tile) tile_product(acc, now, mine, copy, [&](int s) { if (more) loader.load_used(now, at - 16 * lane, lane, s); });
      else if (more) loader.load(now, at - 16 * lane, lane);
      is_tile = more;
      if (FAR) request_far(unit + 1 + FAR, FAR);
      step();
    }
    const bool ends = stop == row_end, begins = group > head || shared_from == blockIdx.x;
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
