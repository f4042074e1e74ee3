// y = (R x) W_eᵀ for pairs of a token and an expert e, W_e in codes: decode.cu over the experts that have pairs.
//
// What is multiplied is as tall as all segments' matrices, one above the other (pairs.cuh: an expert and up to CAP of its pairs).
// Its units in row-major order are cut into as many runs as there are blocks, as in decode.cu, but by the blocks themselves:
// nobody else knows how many segments there are. Blocks beyond the units leave at once.
// Macros: those of one_token.cuh and pairs.cuh, and TOP_K: pair p has row p / TOP_K of x.

// Threads beside these that registers are left for: those of the next rotation, which can start early.
static constexpr int ROOM = __CUDA_ARCH__ >= 900 && NT == 1 && !BLOCK && (TALL == 1 || __CUDA_ARCH__ == 900 && WARPS > 8) ? 32 : 0;

// The experts' matrices.
struct Matrices {
  const u8* codes;
  int rows, row_tiles, col_tiles;  // row_tiles: of docs/FORMAT.md

  __device__ Matrices(const u8* codes, int rows, const Work& work)
      : codes(codes), rows(rows), row_tiles(TALL == 1 ? work.row_tiles : (rows + 31) / 32), col_tiles(work.col_tiles) {}
  __device__ __forceinline__ const u8* tile(int expert, int row, int col) const {
    return codes + ((size_t)(expert * row_tiles + row) * col_tiles + col) * TILE_BYTES;
  }
  __device__ __forceinline__ Loader loader(int expert) const { return Loader(tile(expert, 0, 0), rows, col_tiles); }
};
// A warp's tiles, unit after unit.
struct Cursor {
  const u8* tile;
  Loader loader;
  int segment, row, col, left;  // units until the end of the run

  __device__ Cursor(const Work& work, const Segment* segments, const Matrices& matrices, int unit, int end, int groups, int wr, int wk)
      : loader(matrices.loader(0)), left(end - unit) {
    const int group = unit / work.per_row;
    segment = group / groups;
    row = (group - segment * groups) * WR + wr;
    col = (unit - group * work.per_row) * WK + wk;
    find(segments, matrices);
  }
  __device__ __forceinline__ void find(const Segment* segments, const Matrices& matrices) {
    const int expert = segments[segment].expert;
    tile = matrices.tile(expert, TALL * row, col);
    loader = matrices.loader(expert);
  }
  __device__ __forceinline__ bool is_tile(const Work& work) const {
    return left > 0 && row < work.row_tiles && col < work.col_tiles;
  }
  __device__ __forceinline__ void advance(const Work& work, const Segment* segments, const Matrices& matrices) {
    --left;
    col += WK;
    tile += WK * TILE_BYTES;
    if (col < work.per_row * WK || left <= 0) return;
    col -= work.per_row * WK;
    row += WR;
    const int height = (work.row_tiles + WR - 1) / WR * WR;
    if (row >= height) row -= height, ++segment;
    find(segments, matrices);
  }
};

// x: [cols] where BLOCK > 0, for pairs of one token; else [column tiles][tokens][72]. order: pairs by expert, by_expert: where each expert's end (SORTED); else
// by_expert: of each pair its expert, in `words` words. limit: segments that there may be. handed, own: [grid][CAP][ROWS];
// handed is EMPTY, and is so again at the end.
extern "C" __global__ void __launch_bounds__(THREADS + ROOM, 1)
experts(const u8* codes, const u16* x, const u8* signs, const int* order, const int* by_expert, const u32* table, const void* scale, u16* y, float* handed,
        float* own, int words, int limit, int count, int of_experts, int tokens, int rows, int row_tiles, int col_tiles) {
  extern __shared__ __align__(128) u8 memory[];
  constexpr int STAGE = WK * CAP * X_STRIDE * 2, NEXT_STAGE = SPREAD ? 2 * HOLE : STAGE, SLOT = ROWS * CAP;
  const int x_end = !BLOCK ? NEXT_STAGE + STAGE : SPREAD ? NEXT_STAGE : col_tiles * 64 * 2;
  let_next_start();
  if (refuses(memory, y, (size_t)count * rows)) return;
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4, wr = warp / WK, wk = warp % WK;
  float* const sums = (float*)(memory + (SPREAD ? HOLE : TABLE_BYTES));  // of take_sums
  u8* const xs = SPREAD ? memory + 3 * HOLE : (u8*)(sums + WARPS * 8 * 64);
  const Pairs pairs(xs + x_end, order, by_expert, words, limit, count, of_experts);
  Filler<THREADS>(table).fill(memory);
  wait_for_previous();
  if (warp == 0) pairs.find(count, of_experts);
  __syncthreads();  // the segments and the table
  pairs.others(count, of_experts, blockIdx.x, gridDim.x, [&](int pair) {
    for (int i = threadIdx.x; i < rows; i += THREADS) y[(size_t)pair * rows + i] = 0;
  });

  const int groups = (row_tiles + WR - 1) / WR, per_row = (col_tiles + WK - 1) / WK, units = *pairs.total * groups * per_row;
  const Work work{row_tiles, col_tiles, per_row, units / (int)gridDim.x, units % (int)gridDim.x};
  auto put = [&](const Segment& s, int slot, int row, const Scales& scales, float4 sum) {
    put_rows(y + (size_t)pairs.of(s, slot) * rows, scales, scale, s.expert * rows, row, rows, sum);
  };
  const int begin = work.begin(blockIdx.x), end = work.begin(blockIdx.x + 1);
  if (begin == end) return;
  const Matrices matrices(codes, rows, work);
  Cursor ahead(work, pairs.segments, matrices, begin, end, groups, wr, wk);
  u32 now[REGS];
  bool is_tile = ahead.is_tile(work);
  if (is_tile) ahead.loader.load(now, ahead.tile, lane);
  ahead.advance(work, pairs.segments, matrices);
  const int head = begin / per_row, shared_from = work.owner(head * per_row);  // the first block that has a part of the head
  int ku = begin - head * per_row, segment = head / groups, group = head - segment * groups;
#if BLOCK
  rotate_for<0, false>(work, ku, end - begin, (u16*)xs, sums, Input(x, x, x, nullptr, 0, 0, 0, 0), signs, col_tiles * 64, [] {}, [] {});
#else
  auto stage = [&](int unit, int segment, int col) {  // x of a unit on its way to shared memory
    const Segment& s = pairs.segments[segment];
    u8* const to = xs + (unit - begin) % 2 * NEXT_STAGE;
    #pragma unroll 1
    for (int i = threadIdx.x; i < WK * CAP * 8; i += THREADS) {  // of 16 bytes
      const int slot = i / 8 % CAP, tile = i / 8 / CAP;
      if (slot >= s.count || col + tile >= col_tiles) continue;
      const size_t row = (size_t)(col + tile) * tokens + pairs.of(s, slot) / TOP_K;
      copy16_async(to + (tile * CAP + slot) * X_STRIDE * 2 + i % 8 * 16, x + row * X_STRIDE + i % 8 * 8);
    }
    commit_async();
  };
  stage(begin, segment, ku * WK);
#endif

  const u32 copy = own_copy();
  float acc[4][NT][4];
  #pragma unroll
  for (int i = 0; i < 4 * NT * 4; ++i) (&acc[0][0][0])[i] = 0;

  bool later = false, begins = shared_from == blockIdx.x;
  for (int unit = begin; unit < end; ku = 0, begins = true) {
    const Segment& s = pairs.segments[segment];
    const bool last_group = group + 1 == groups;
    if (BLOCK) request_scales(scale, s.expert * rows + group * ROWS, min(ROWS, rows - group * ROWS), THREADS);
    for (const int stop = min(end, unit - ku + per_row); unit < stop; ++unit, ++ku) {
#if BLOCK
      const u16* const mine = (const u16*)xs + (ku * WK + wk) * 64 + 16 * t;
#else
      wait_async();
      __syncthreads();
      if (unit + 1 < end) {
        const bool same = ku + 1 < per_row;
        stage(unit + 1, segment + (!same && last_group), same ? (ku + 1) * WK : 0);
      }
      const int slot = NT == 1 ? min(g, s.count - 1) : g;
      const u16* const mine = (const u16*)(xs + (unit - begin) % 2 * NEXT_STAGE) + (wk * CAP + slot) * X_STRIDE + 16 * t;
#endif
      const bool more = ahead.is_tile(work);
      if (is_tile) tile_product(acc, now, mine, copy, [&](int step) { if (more) ahead.loader.load_used(now, ahead.tile, lane, step); });
      else if (more) ahead.loader.load(now, ahead.tile, lane);
      is_tile = more;
      ahead.advance(work, pairs.segments, matrices);
    }
    const bool ends = ku == per_row;
    later |= ends && !begins;
    const Scales scales(scale, s.expert * rows, group * ROWS, rows);
    take_sums(acc, sums, s.count, warp, [&](int slot, int row, float4 sum) {
      const int at = blockIdx.x * SLOT + slot * ROWS + row;
      if (!ends) hand_over(handed + at, sum);
      else if (begins) put(s, slot, group * ROWS + row, scales, sum);
      else *(float4*)(own + at) = sum;
    });
    group = last_group ? 0 : group + 1;
    segment += last_group;
  }
  if (!later) return;
  const int head_group = head % groups;  // again: kept, it would take registers from the products
  const Segment& s = pairs.segments[head / groups];
  const Scales scales(scale, s.expert * rows, head_group * ROWS, rows);
  take_parts(handed, own + blockIdx.x * SLOT, SLOT, s.count, shared_from,
             [&](int slot, int row, float4 sum) { put(s, slot, head_group * ROWS + row, scales, sum); });
}
