// y = x Vᵀ · scale for experts with many pairs on Hopper: some warps decode V into shared memory, warpgroups multiply what is there.
//
// A tile of y is 64 rows a warpgroup × TOKENS tokens; a unit is one step of it, 64 columns. Units, tile after tile, are cut
// into as many equal runs as there are blocks. A ring of STAGES holds units: a job of a decoding warp is 16 columns of 64
// rows; x, which comes rotated, is copied by the one that has a unit's first job.
// Where several blocks have units of one tile, the one with its first unit adds up what they have (exchange.cuh), always in
// the same order. The first blocks have the last runs: so each hands over what is needed elsewhere before anything else, and
// a tile whose sums come from others, which are blocks before it, is its last.
// A tile's tokens are pairs of one expert, as route.cu has put them in order, and only the GPU knows how many tiles there are.
// Macros, besides those of output.cuh, exchange.cuh and slots.cuh: TOKENS (32, 64 or 128), WARPGROUPS, DECODERS (warps, by fours), STAGES.

static constexpr int MULTIPLIERS = 4 * WARPGROUPS, THREADS = 32 * (MULTIPLIERS + DECODERS), ROWS = 64 * WARPGROUPS;
static constexpr int X_BYTES = TOKENS * 128, STAGE_BYTES = WARPGROUPS * ROW_TILE + X_BYTES;
static constexpr int SLOT = ROWS * TOKENS;  // floats of a tile's sums

// ---- which units a run has ----

struct Tile {
  int row_tile, token_block, expert;  // row_tile: the first one
};
struct Work {
  int units, row_tiles, col_tiles, token_blocks, runs;
  const int* experts;  // of the blocks of tokens

  __device__ Work(int row_tiles, int col_tiles, int token_blocks, const int* experts)
      : row_tiles(row_tiles), col_tiles(col_tiles), token_blocks(token_blocks), experts(experts) {
    units = row_groups() * token_blocks * col_tiles;
    runs = max(1, min((int)gridDim.x, units));  // that are not empty: these come last
  }
  __device__ int row_groups() const { return (row_tiles + WARPGROUPS - 1) / WARPGROUPS; }
  __device__ int begin(int run) const { return (int)((long long)units * min(run, runs) / runs); }
  __device__ int owner(int unit) const { return (int)(((long long)(unit + 1) * runs - 1) / units); }
  // All rows after each other have the same tokens.
  __device__ Tile tile(int n) const {
    const int block = n / row_groups();
    return {n % row_groups() * WARPGROUPS, block, block < token_blocks ? experts[block] : 0};
  }
};
__device__ __forceinline__ int own_run() { return gridDim.x - 1 - blockIdx.x; }

// ---- the ring ----

struct Barriers {
  u64 full[STAGES], empty[STAGES];
};
static constexpr int IN_HOLE = SPREAD ? HOLE / STAGE_BYTES : 1;  // stages lie where the table has none of its entries
static constexpr int BARRIERS_AT = !SPREAD                                  ? TABLE_BYTES + STAGES * STAGE_BYTES
                                   : IN_HOLE * STAGE_BYTES + 256 <= HOLE ? 2 * HOLE - 256
                                                                        : TABLE_BYTES;
struct Ring {
  u8* memory;
  Barriers* barriers;

  __device__ __forceinline__ u8* at(int stage) const {
    if (!SPREAD) return memory + TABLE_BYTES + stage * STAGE_BYTES;
    static_assert(!SPREAD || STAGES <= 3 * IN_HOLE, "the holes have room");
    return memory + (2 * (stage / IN_HOLE) + 1) * HOLE + stage % IN_HOLE * STAGE_BYTES;
  }
  __device__ __forceinline__ u8* x_at(int stage) const { return at(stage) + WARPGROUPS * ROW_TILE; }
};
// A stage, and how often the ring went round.
struct Place {
  int stage, parity;

  __device__ __forceinline__ void advance(int by) {
    stage += by;
    #pragma unroll 1
    for (; stage >= STAGES; stage -= STAGES) parity ^= 1;
  }
};

// ---- decoding ----

// The tiles of which a warp decodes a step: every GROUPS-th of a run's, WARPGROUPS a unit.
struct Cursor {
  static constexpr int GROUPS = DECODERS / 4;
  int left, row, col, number;  // units until the end of the run; row: of WARPGROUPS
  Tile tile;

  __device__ Cursor(const Work& work, int group) : row(group) {
    const int begin = work.begin(own_run());
    left = work.begin(own_run() + 1) - begin;
    number = begin / work.col_tiles;
    col = begin % work.col_tiles;
    tile = work.tile(number);
    skip(work);
  }
  __device__ __forceinline__ void advance(const Work& work) {
    row += GROUPS;
    skip(work);
  }
  __device__ __forceinline__ void skip(const Work& work) {
    #pragma unroll 1
    for (; row >= WARPGROUPS; row -= WARPGROUPS) {
      --left;
      if (++col < work.col_tiles) continue;
      col = 0;
      tile = work.tile(++number);
    }
  }
  __device__ __forceinline__ const u8* codes(const Work& work, const u8* of_all) const {
    const size_t row_tile = (size_t)tile.expert * work.row_tiles + min(tile.row_tile + row, work.row_tiles - 1);
    return of_all + (row_tile * work.col_tiles + col) * TILE_BYTES;
  }
};
// What the n-th of the decoding warps does.
__device__ __forceinline__ void decode_run(const Work& work, const Ring& ring, const u8* codes, const u16* x, int x_blocks, int n) {
  constexpr int AHEAD = 3;  // jobs whose codes are requested ahead
  const int lane = threadIdx.x % 32;
  const bool brings_x = n % 4 == 0 && lane == 0;
  const u32 copy = own_copy(), to = place_of_step(n % 4, lane);
  const Step step(n % 4, lane);
  Cursor now(work, n / 4), next = now;
  u32 r[AHEAD][Step::LOADED];
  #pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (next.left > 0) step.load(r[i], next.codes(work, codes));
    next.advance(work);
  }
  Place place{0, 0};
  place.advance(n / 4 / WARPGROUPS);
  auto job = [&](u32* r) {  // whether there was one
    if (now.left <= 0) return false;
    await(ring.barriers->empty + place.stage, place.parity ^ 1);
    if (brings_x && now.row == 0)
      copy_bulk(ring.x_at(place.stage), x + ((size_t)now.col * x_blocks + now.tile.token_block) * (X_BYTES / 2), X_BYTES, ring.barriers->full + place.stage);
    step.decode(ring.at(place.stage) + now.row * ROW_TILE + to, r, copy);
    if (next.left > 0) step.load(r, next.codes(work, codes));
    __syncwarp();
    if (lane == 0) arrive(ring.barriers->full + place.stage);
    place.advance((now.row + Cursor::GROUPS) / WARPGROUPS);
    now.advance(work);
    next.advance(work);
    return true;
  };
  while (job(r[0]) && job(r[1]) && job(r[2]));
}

// ---- the product ----

// By every warp that has read a stage.
__device__ __forceinline__ void release(const Ring& ring, int stage) {
  if (threadIdx.x % 32 == 0) arrive(ring.barriers->empty + stage);
}
// acc = the warpgroup's rows · x, `count` units.
__device__ __forceinline__ void multiply_units(float* acc, int count, const Ring& ring, Place& place) {
  auto multiply_next = [&] {
    await(ring.barriers->full + place.stage, place.parity);
    const u32 a = shared_address(ring.at(place.stage)) + threadIdx.x / 128 * ROW_TILE, b = shared_address(ring.x_at(place.stage));
    show_to_products();
    begin_products();
    #pragma unroll
    for (int s = 0; s < 4; ++s) multiply(acc, describe(a, 16 * s), describe(b, 16 * s));
    commit_products();
  };
  #pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0;
  if (TOKENS <= 64) {  // decoding is what takes time: it gets a stage back as soon as may be
    for (; count; --count) {
      multiply_next();
      await_products<0>();
      release(ring, place.stage);
      place.advance(1);
    }
    return;
  }
  multiply_next();
  while (--count) {
    const int before = place.stage;
    place.advance(1);
    multiply_next();
    await_products<1>();
    release(ring, before);
  }
  await_products<0>();
  release(ring, place.stage);
  place.advance(1);
}

// ---- sums ----

// acc += what other blocks hand over, of the runs from `first` to `last`.
__device__ __forceinline__ void add_up(float* acc, float* handed, int first, int last) {
  constexpr int AT_ONCE = TOKENS == 128 ? 2 : 4;
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
__device__ __forceinline__ void multiply_run(const Work& work, const Ring& ring, const Output& out, float* handed) {
  const int run = own_run(), begin = work.begin(run), end = work.begin(run + 1), col_tiles = work.col_tiles;
  Place place{0, 0};
  float acc[TOKENS / 2];
  for (int unit = begin; unit < end;) {
    const int tile = unit / col_tiles, tile_begin = tile * col_tiles, tile_end = tile_begin + col_tiles, stop = min(end, tile_end);
    const Tile own = work.tile(tile);
    const int row = own.row_tile * 64 + threadIdx.x / 32 * 16;
    if (unit == tile_begin) out.request_scales(row, own.expert);
    multiply_units(acc, stop - unit, ring, place);
    if (unit > tile_begin) hand_over_some<0, TOKENS / 8>(acc, handed + (size_t)run * SLOT);
    else {
      if (stop < tile_end) add_up(acc, handed, run + 1, work.owner(tile_end - 1));
      const float2 by = out.scales(row, own.expert);
      int places[TOKENS / 32];  // of 32 tokens, one a lane: all come from memory at once where there are experts
      #pragma unroll
      for (int i = 0; i < TOKENS / 32; ++i) places[i] = out.place(own.token_block * TOKENS + 32 * i + threadIdx.x % 32);
      #pragma unroll
      for (int i = 0; i < TOKENS / 8; ++i) {
        const int place = __shfl_sync(~0u, places[i / 4], 8 * (i % 4) + threadIdx.x % 32 / 4);
        out.put(make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]), by, row, place);
      }
    }
    unit = stop;
  }
}

// x [column tiles][padded tokens][64], chunks of 16 bytes swizzled, columns in the order of place_of_step; codes, scale and y
// as in decode.cu, of all experts. handed: [grid][SLOT] EMPTY, which it is again at the end. blocks, pairs: as route.cu writes them.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
prefill(const u8* codes, const u16* x, const u32* table, const void* scale, u16* y, float* handed, const int* blocks, const int* pairs,
        int tokens, int padded, int rows, int row_tiles, int col_tiles) {
  extern __shared__ __align__(1024) u8 memory[];
  let_next_start();
  if (refuses(memory, y, (size_t)tokens * rows)) return;
  wait_for_previous();  // which counts blocks
  const Work work(row_tiles, col_tiles, blocks[0], blocks + 1);
  const Ring ring{memory, (Barriers*)(memory + BARRIERS_AT)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(ring.barriers->full + i, MULTIPLIERS + 1);  // a job each, and x
      init_barrier(ring.barriers->empty + i, MULTIPLIERS);
    }
    publish_barriers();
  }
  Filler<THREADS>(table).fill(memory);
  __syncthreads();
  const int decoder = uniform(threadIdx.x / 32) - MULTIPLIERS;
  if (decoder >= 0) decode_run(work, ring, codes, x, padded / TOKENS, decoder);
  else multiply_run(work, ring, Output{y, scale, tokens, rows, pairs}, handed);
}
