// y = x Vᵀ · scale for some tokens on Hopper: warps decode V straight into the registers that warpgroups multiply from.
//
// A tile of y is ROWS × TOKENS. A unit is 64 of its columns. WK · WR warpgroups: those of a row take turns with the units,
// those side by side have rows of their own. A warp has 64 / SHARED_BY rows of a tile of codes, or a tile of 32 rows for itself (lattice.cuh). x, which comes rotated, goes through
// a ring of STAGES units: the first group of a row brings what lies STAGES units beyond the one that it is done with.
// PARTS blocks have a tile of y together, each a run of units. Each adds up an equal share of the tile, so each waits for
// all others. They have numbers in a row, and the GPU starts blocks in order: of the blocks of a kernel that have started,
// those of one tile at most wait for some that have not. They are fewer than the GPU has multiprocessors, so others end, and
// the missing ones start. Only as many such kernels at a time as keep all multiprocessors waiting could stop each other.
// Macros, besides those of output.cuh and exchange.cuh: TOKENS (32, 64 or 128), SHARED_BY (1, 2 or 4), WR, WK, STAGES, PARTS.

static constexpr int FAR = 1;  // units whose codes are requested into the L2 cache ahead of their loads
static constexpr int PRODUCTS = 4 / SHARED_BY;  // a warp has 16 rows of each
static constexpr int GROUP_ROWS = 64 * PRODUCTS, ROWS = WR * GROUP_ROWS;  // of a warpgroup, and of all
static constexpr int WARPS = 4 * WR * WK, THREADS = 32 * WARPS;
static constexpr int BLOCKS_OF_8 = TOKENS / 8, HELD = PRODUCTS * BLOCKS_OF_8, TILE_FRAGMENTS = 4 * WR * HELD;  // of 16 rows × 8 tokens: a warp's, and the tile's
static constexpr int STAGE_BYTES = TOKENS * 128;

// ---- x ----

// Stages lie after the table, or where it has none of its entries. Where is known to the compiler, as is where shared memory begins (tiles.cuh).
static constexpr int IN_HOLE = SPREAD ? HOLE / STAGE_BYTES : STAGES;
static constexpr int BARRIERS_AT = SPREAD ? 6 * HOLE - 256 : TABLE_BYTES + STAGES * STAGE_BYTES;
static_assert(WK <= STAGES, "a step goes round the ring once at most");
static_assert(!SPREAD || STAGES * STAGE_BYTES + 256 <= 3 * HOLE, "the holes have room");

__device__ __forceinline__ u32 stage_at(u32 stage) {
  return TABLE_AT + (SPREAD ? (2 * (stage / IN_HOLE) + 1) * HOLE : TABLE_BYTES) + stage % IN_HOLE * STAGE_BYTES;
}
__device__ __forceinline__ u64* full(u32 stage) { return in_shared<u64>(TABLE_AT + BARRIERS_AT + 8 * stage); }
__device__ __forceinline__ u64* empty(u32 stage) { return full(stage) + STAGES; }
// A stage, and how often the ring went round.
struct Place {
  u32 stage, parity;

  __device__ __forceinline__ void advance(u32 by) {
    stage += by;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

// x of a block's units.
struct Source {
  const u16* x;
  size_t stride;  // from one unit to the next
  int units;

  __device__ __forceinline__ void bring(int unit, u32 stage) const {  // by one thread
    if (unit < units) copy_bulk(in_shared<u8>(stage_at(stage)), x + unit * stride, STAGE_BYTES, full(stage));
  }
};

// ---- the product ----

#ifdef NESTED  // lattice.cuh
// A warp has a tile of codes by itself: 32 rows.
static_assert(SHARED_BY == TALL, "as many warps have 64 rows as they are tiles");
static constexpr bool ALONE = true;
__device__ __forceinline__ void decode(u32 (*a)[4], const u32* r, int s, int, u32 copy) { fragments(a, r, s, copy); }
#else
static constexpr bool ALONE = false;
// A warp's operands of step s, of which it has the PART-th rows.
template <int PART> __device__ __forceinline__ void decode_part(u32 (*a)[4], const u32* r, int s, u32 copy) {
  constexpr bool HAS_END = CODE_BITS * (2 * PRODUCTS * (PART + 1) - 1) / 8 > CODE_BITS - 16;
  u32 ends[2] = {};
  if (HAS_END) ends_of(ends, r, s);
  #pragma unroll
  for (int m = 0; m < PRODUCTS; ++m)
    #pragma unroll
    for (int e = 0; e < 4; ++e) a[m][e] = value(hash_of(r, ends, s, PART * PRODUCTS + m, e), copy);
}
__device__ __forceinline__ void decode(u32 (*a)[4], const u32* r, int s, int part, u32 copy) {
  if (SHARED_BY == 1) decode_part<0>(a, r, s, copy);
  else if (SHARED_BY == 2) {
    if (part == 0) decode_part<0>(a, r, s, copy);
    else decode_part<1 % SHARED_BY>(a, r, s, copy);
  } else {
    if (part == 0) decode_part<0>(a, r, s, copy);
    else if (part == 1) decode_part<1 % SHARED_BY>(a, r, s, copy);
    else if (part == 2) decode_part<2 % SHARED_BY>(a, r, s, copy);
    else decode_part<3 % SHARED_BY>(a, r, s, copy);
  }
}
#endif
// Whether a lane requests codes of a tile into the L2 cache, 128 bytes, for the warps that have it together.
__device__ __forceinline__ bool requests_far(int part, int lane) { return (ALONE || part == 0) && lane < TILE_BYTES / 128; }
// acc = a warp's rows · x over its units: of the block's, every WK-th from `unit` on. r: codes of the first one.
__device__ __forceinline__ void multiply_units(float (*acc)[TOKENS / 2], u32* r, const u8* tile, int unit, const Source& source, int part, bool brings) {
  const int lane = threadIdx.x % 32;
  const u32 copy = own_copy();
  const bool requests = requests_far(part, lane);
  const u8* mine = tile + 16 * lane;
  u32 a[2][PRODUCTS][4];
  Place place{(u32)unit, 0}, before{0, 0};
  bool later = false;  // than its first
  #pragma unroll 1
  for (; unit < source.units; unit += WK) {
    mine += WK * TILE_BYTES;
    hold(mine);
    const bool more = unit + WK < source.units;
    const u32 b = stage_at(place.stage);
    if (requests && unit + (FAR + 1) * WK < source.units) request_to_l2(mine + FAR * WK * TILE_BYTES + 112 * lane);
    #pragma unroll
    for (int s = 0; s < 4; ++s) {
      decode(a[s % 2], r, s, part, copy);
      if (more) load_used(r, mine - 16 * lane, lane, s);
      if (s == 0) await(full(place.stage), place.parity);
      if (s == 2 && brings && later && unit - WK + STAGES < source.units) {
        await(empty(before.stage), before.parity);
        source.bring(unit - WK + STAGES, before.stage);
      }
      await_products<0>();
      if (s == 0 && later && lane == 0) arrive(empty(before.stage));
      __syncwarp();
      begin_products();
      #pragma unroll
      for (int m = 0; m < PRODUCTS; ++m) multiply(acc[m], a[s % 2][m], describe(b, 16 * s));
      commit_products();
    }
    later = true;
    before = place;
    place.advance(WK);
  }
  await_products<0>();
  #pragma unroll
  for (int m = 0; m < PRODUCTS; ++m) settle(acc[m]);
}

// ---- sums ----

static constexpr int SUMS_BYTES = WK * TILE_FRAGMENTS * 32 * 16;
static_assert(ROWS <= THREADS, "a thread has the scale of one row at most");

// What the blocks of a tile have of y, each its share of the fragments. sums: [WK][TILE_FRAGMENTS][32], what this one's warps have; scales: of the tile's
// rows; handed: of the tile, [PARTS - 1][TILE_FRAGMENTS][32], for each fragment what the other blocks have.
__device__ __forceinline__ void add_up(const float4* sums, const float* scales, float4* handed, int rank, const Output& out, int row, int token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = TILE_FRAGMENTS * rank / PARTS, end = TILE_FRAGMENTS * (rank + 1) / PARTS;
  auto own = [&](int f) {
    float4 sum = sums[f * 32 + lane];
    #pragma unroll
    for (int k = 1; k < WK; ++k) add(sum, sums[(k * TILE_FRAGMENTS + f) * 32 + lane]);
    return sum;
  };
  #pragma unroll 1
  for (int i = warp; i < TILE_FRAGMENTS - (end - begin); i += WARPS) {
    const bool below = i < begin;
    const int f = below ? i : i + end - begin;
    hand_over((float*)(handed + ((rank - below) * TILE_FRAGMENTS + f) * 32 + lane), own(f));
  }
  #pragma unroll 1
  for (int f = begin + warp; f < end; f += WARPS) {
    float4 sum = own(f);
    if (PARTS > 1) {
      float4 others[PARTS > 1 ? PARTS - 1 : 1];
      take_over(others, (float*)(handed + f * 32 + lane), TILE_FRAGMENTS * 128);
      #pragma unroll
      for (int i = 0; i < PARTS - 1; ++i) add(sum, others[i]);
    }
    const int of_warp = f / HELD, m = f % HELD / BLOCKS_OF_8;  // where the warp that had it has its rows
    const int tile = of_warp / 4 * PRODUCTS + of_warp % 4 / SHARED_BY, part = of_warp % 4 % SHARED_BY;
    const int first = 64 * tile + 16 * (part * PRODUCTS + m), of_lane = first + lane / 4;
    out.put(sum, make_float2(scales[of_lane], scales[of_lane + 8]), row + first, out.place(token + f % BLOCKS_OF_8 * 8 + lane / 4));
  }
}

// x [column tiles][padded tokens][64] as rotate.cu has FRAGMENTS; codes, scale and y as in decode.cu. handed: [tiles][PARTS - 1][ROWS · TOKENS] EMPTY,
// which it is again at the end. first_tile: of y, of the grid.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
batch(const u8* codes, const u16* x, const u32* table, const void* scale, u16* y, float* handed,
      int tokens, int padded, int rows, int row_tiles, int col_tiles, int first_tile) {
  extern __shared__ __align__(1024) u8 memory[];
  if (refuses(memory, y, (size_t)tokens * rows)) return;
  Filler<THREADS> filler(table);
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), group = warp / 4, wk = group % WK, wr = group / WK;
  const int row_tile = (first_tile + blockIdx.y) * (ROWS / 64), token = blockIdx.x / PARTS * TOKENS, rank = blockIdx.x % PARTS;
  const int begin = col_tiles * rank / PARTS;
  const int part = warp % SHARED_BY, of_64 = row_tile + wr * PRODUCTS + warp % 4 / SHARED_BY;
  const int own_tile = ALONE ? min(TALL * of_64 + part, (rows - 1) / 32) : min(of_64, row_tiles - 1);
  const bool brings = lane == 0 && warp % 4 == 0 && wr == 0;
  const Source source{x + ((size_t)begin * padded + token) * 64, (size_t)padded * 64, col_tiles * (rank + 1) / PARTS - begin};
  const u8* const first = codes + ((size_t)own_tile * col_tiles + begin + wk) * TILE_BYTES;
  u32 r[LANE_REGS];
  if (wk < source.units) load_codes(r, first, lane);
  if (requests_far(part, lane))
    #pragma unroll 1
    for (int i = 1; i <= FAR && wk + i * WK < source.units; ++i) request_to_l2(first + i * WK * TILE_BYTES + 128 * lane);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(full(i), 1);
      init_barrier(empty(i), 4 * WR);
    }
    publish_barriers();
  }
  filler.fill(memory);
  __syncthreads();
  wait_for_previous();  // which may have rotated x, and use y and what is handed over
  if (brings)
    for (int unit = wk; unit < STAGES; unit += WK) source.bring(unit, unit);
  const int own_row = row_tile * 64 + threadIdx.x;  // asked for now, since it comes from far
  const float own_scale = threadIdx.x < ROWS && own_row < rows ? load_scale(scale, own_row) : 0;
  float acc[PRODUCTS][TOKENS / 2];
  #pragma unroll
  for (int i = 0; i < PRODUCTS * TOKENS / 2; ++i) (&acc[0][0])[i] = 0;
  multiply_units(acc, r, first, wk, source, part, brings);
  __syncthreads();  // nobody looks up any more: sums lie where the table was
  float4* const sums = (float4*)memory;
  float* const scales = (float*)(memory + SUMS_BYTES);
  if (threadIdx.x < ROWS) scales[threadIdx.x] = own_scale;
  #pragma unroll
  for (int j = 0; j < HELD; ++j) {
    const float* const from = acc[j / BLOCKS_OF_8] + j % BLOCKS_OF_8 * 4;
    sums[((wk * WR * 4 + wr * 4 + warp % 4) * HELD + j) * 32 + lane] = make_float4(from[0], from[1], from[2], from[3]);
  }
  __syncthreads();
  // The next rotation starts here and not at once: its blocks would gather, six at a time, on the few multiprocessors that have no tile, where the
  // last ends twice as late as where all have one. With 64 tokens they have enough to do to start when these are done.
  if (TOKENS < 64) let_next_start();
  const size_t tile = blockIdx.y * (padded / TOKENS) + blockIdx.x / PARTS;
  add_up(sums, scales, (float4*)handed + tile * (PARTS - 1) * TILE_FRAGMENTS * 32, rank, Output{y, scale, tokens, rows}, row_tile * 64, token);
}
