// y = x Vᵀ · scale for many tokens on Hopper: warps decode V straight into the registers that warpgroups multiply from (quarters.cuh), the next unit's
// while the products of one run.
//
// A tile of y is 64 rows for each of two warpgroups × TOKENS tokens; a unit is one step of it, 64 columns. CLUSTER blocks with rows side by side
// bring x, which comes rotated, for each other: each a share of a unit, to all. It goes through a ring of STAGES units, which one thread fills.
// Units, tile after tile, are cut into as many equal runs as there are clusters. Where several have units of one tile, the one with its
// first unit adds up what they have (exchange.cuh), always in the same order. The first clusters have the last runs: so each hands over
// what is needed elsewhere before anything else, and a tile whose sums come from others, which are clusters before it, is its last. Where
// no run is shorter than a tile, they have long been there when it begins, and are what its sums begin with.
// Where each tile is two runs, each of the two clusters adds up half of the tokens, so each waits for the other: they are neighbours, and the GPU
// starts clusters in order, so of a kernel one cluster at most waits for one that has not started.
// No block ends while another may still send to it: it waits for all x, and for every arrival that it gets, as it gets none that nobody waits for.
// Macros, besides those of output.cuh, exchange.cuh and slots.cuh: TOKENS (128 or 256), CLUSTER, STAGES.

static constexpr int GROUPS = 2;  // warpgroups that multiply
static constexpr int TAKEN = 240, LEFT = 24;  // registers of their threads, and of the others': all that a block has, 168 a thread
static constexpr int WARPS = 4 * GROUPS, THREADS = 32 * WARPS + 128, ROWS = 64 * GROUPS;
static_assert(32 * WARPS * TAKEN + 128 * LEFT <= THREADS * (65536 / THREADS / 8 * 8), "who takes registers waits for those that others leave");
static constexpr int TILES_OF_CODES = GROUPS * TALL;  // of docs/FORMAT.md, that a block's rows have
static constexpr int STAGE_BYTES = TOKENS * 128, SHARE = STAGE_BYTES / CLUSTER;
static constexpr int SLOT = ROWS * TOKENS;  // floats of a tile's sums
static constexpr int FAR = 3;               // units whose codes are requested into the L2 cache ahead of their x

// ---- which units a run has ----

struct Work {
  int row_tiles, col_tiles, token_blocks;
  u32 units, runs;

  __device__ Work(int row_tiles, int col_tiles, int token_blocks) : row_tiles(row_tiles), col_tiles(col_tiles), token_blocks(token_blocks) {
    units = (row_tiles + GROUPS * CLUSTER - 1) / (GROUPS * CLUSTER) * token_blocks * col_tiles;
    runs = gridDim.x / CLUSTER;
  }
  __device__ int begin(int run) const { return units * run / runs; }
  __device__ int owner(int unit) const { return ((unit + 1) * runs - 1) / units; }
  // Whether no run is shorter than a tile.
  __device__ bool long_runs() const { return units >= runs * col_tiles; }
  // Then the unit with which a run's last tile begins, if the rest of it is what the next run began with; else −1.
  __device__ int taken_up(int run) const {
    const int end = begin(run + 1), own = end % col_tiles;
    return long_runs() && own ? end - own : -1;
  }
  // Whether each tile is two runs, of which each adds up half of the tokens.
  __device__ bool halves() const { return 2 * units == runs * col_tiles; }
};
__device__ __forceinline__ int own_rank() { return CLUSTER > 1 ? blockIdx.x % CLUSTER : 0; }
__device__ __forceinline__ int own_run() { return (gridDim.x - 1 - blockIdx.x) / CLUSTER; }

// ---- x ----

static constexpr int BARRIERS_AT = SPREAD ? TABLE_BYTES : TABLE_BYTES + STAGES * STAGE_BYTES;
static constexpr int IN_HOLE = SPREAD ? HOLE / STAGE_BYTES : STAGES;
static_assert(!SPREAD || STAGES <= 3 * IN_HOLE, "the holes have room");

__device__ __forceinline__ u32 stage_at(u32 stage) {  // from the beginning of the table
  return (SPREAD ? (2 * (stage / IN_HOLE) + 1) * HOLE : TABLE_BYTES) + stage % IN_HOLE * STAGE_BYTES;
}
struct Barriers {
  u64 full[STAGES], empty[STAGES];
};
// A stage, and how often the ring went round.
struct Place {
  u32 stage, parity;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};
// What is brought of x, by one thread. A release of the ring, of which a run of n units has n + 1, says that all units before it are multiplied: unit i's x
// waits for release i − (STAGES − 1). This thread sees them all, so that none comes to a block that is over.
static_assert(STAGES > 1, "the first unit's x waits for none");
__device__ __forceinline__ void bring_run(const Work& work, u8* memory, Barriers* barriers, const u16* x, int padded) {
  Place place{0, 0}, released{0, 0};
  auto await_release = [&] {
    await(barriers->empty + released.stage, released.parity);
    released.advance();
  };
  const int begin = work.begin(own_run()), end = work.begin(own_run() + 1), rank = own_rank();
  int ahead = 0;  // units brought whose releases were not waited for
  wait_for_previous();
  let_next_start();  // not at once: a rotation that runs beside this relies on all that was complete when this had its x
  int tile = begin / work.col_tiles, col = begin % work.col_tiles;
  #pragma unroll 1
  for (int i = 0; i < end - begin; ++tile, col = 0) {
    const u16* from = x + ((size_t)col * padded + tile % work.token_blocks * TOKENS) * 64 + rank * (SHARE / 2);
    #pragma unroll 1
    for (; col < work.col_tiles && i < end - begin; ++col, ++i, from += (size_t)padded * 64) {
      hold(from);
      if (ahead == STAGES - 1) await_release();
      else ++ahead;
      expect(barriers->full + place.stage, STAGE_BYTES);
      copy_to_cluster<CLUSTER>(memory + stage_at(place.stage) + rank * SHARE, from, SHARE, barriers->full + place.stage);
      place.advance();
    }
  }
  #pragma unroll 1
  for (; ahead >= 0; --ahead) await_release();
}

// ---- the product ----

// Of a warp.
struct Codes {
  const u8* codes;
  int row_tiles, col_tiles, token_blocks, own;  // tiles of docs/FORMAT.md; own: which row tile of a cluster's

  __device__ __forceinline__ const u8* at(int tile, int col) const {
    const int row_tile = min(tile / token_blocks * (TALL * GROUPS * CLUSTER) + own, row_tiles - 1);
    return codes + ((size_t)row_tile * col_tiles + col) * TILE_BYTES;
  }
};
// A run's codes into the L2 cache, long before they are loaded: by one warp, a lane for each of the tiles that a block has side by side. Each lane arrives
// for a stage's next release when it has seen the last one: else it could miss one, and would wait for ever.
__device__ __forceinline__ void request_run(const Work& work, const Codes& codes, Barriers* barriers) {
  Place released{0, 0};
  auto await_release = [&] {
    await(barriers->empty + released.stage, released.parity);
    arrive(barriers->empty + released.stage);
    released.advance();
  };
  for (int i = 0; i < STAGES; ++i) arrive(barriers->empty + i);
  const int begin = work.begin(own_run()), end = work.begin(own_run() + 1);
  int unit = begin, col = begin % codes.col_tiles;
  const u8* at = codes.at(begin / codes.col_tiles, col);
  #pragma unroll 1
  for (; unit < end; ++unit) {
    if (unit >= begin + FAR + STAGES - 1) await_release();
    request_bulk(at, TILE_BYTES);
    at += TILE_BYTES;
    if (++col == codes.col_tiles) {
      col = 0;
      at = codes.at(unit / codes.col_tiles + 1, 0);
    }
  }
  #pragma unroll 1
  for (int i = min(FAR, end - begin - STAGES + 1); i > 0; --i) await_release();
}

// ---- sums ----

// Where a block of the run with that number hands over the sums of a tile.
__device__ __forceinline__ float* slot_of(float* handed, int run) { return handed + (size_t)(run * CLUSTER + own_rank()) * SLOT; }

// Of fragments FROM … FROM + COUNT − 1: acc += what other clusters hand over, of the runs from `first` to `last`. AHEAD fragments are on their way at any time, as much as there are registers for.
template <int FROM, int COUNT> __device__ __forceinline__ void add_up(float* acc, float* handed, int first, int last) {
  constexpr int AHEAD = COUNT < 16 ? COUNT : 16;
  acc += 4 * FROM;
  #pragma unroll 1
  for (int run = first; run <= last; ++run) {
    float* const from = slot_of(handed, run) + place_in_slot() + 512 * FROM;
    while (!is_there(load_shared_by_gpu(from + 512 * (COUNT - 1))));  // the others have come then, or nearly
    uint4 v[AHEAD];
    #pragma unroll
    for (int i = 0; i < AHEAD; ++i) v[i] = load_shared_by_gpu(from + 512 * i);
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      uint4& next = v[i % AHEAD];
      while (!is_there(next)) next = load_shared_by_gpu(from + 512 * i);
      store_shared_by_gpu(from + 512 * i, EMPTY, EMPTY, EMPTY, EMPTY);
      acc[4 * i] += __uint_as_float(next.x), acc[4 * i + 1] += __uint_as_float(next.y);
      acc[4 * i + 2] += __uint_as_float(next.z), acc[4 * i + 3] += __uint_as_float(next.w);
      if (i + AHEAD < COUNT) next = load_shared_by_gpu(from + 512 * (i + AHEAD));
    }
  }
  __syncwarp();
}
// acc = what a cluster handed over long before, all of it on its way at once, to the sums' own registers: if it is copied there afterwards, as take_over would
// have it, the assembler makes each product wait for the one before.
__device__ __forceinline__ void take_up(float* acc, float* slot) {
  constexpr int ALL = TOKENS / 8;
  float* const from = slot + place_in_slot();
  u32 most;
  do {
    #pragma unroll
    for (int i = 0; i < ALL; ++i) {
      const uint4 v = load_shared_by_gpu(from + 512 * i);
      acc[4 * i] = __uint_as_float(v.x), acc[4 * i + 1] = __uint_as_float(v.y), acc[4 * i + 2] = __uint_as_float(v.z), acc[4 * i + 3] = __uint_as_float(v.w);
    }
    most = 0;
    #pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) most = max(most, __float_as_uint(acc[i]));
  } while (most == EMPTY);
  #pragma unroll
  for (int i = 0; i < ALL; ++i) store_shared_by_gpu(from + 512 * i, EMPTY, EMPTY, EMPTY, EMPTY);
  __syncwarp();
}
// Of the same fragments: a warp's 16 rows of y, from `row` on, of a tile whose tokens are those from `token` on; by: the rows' scales. Fragments take turns in what a lane waits for.
template <bool WHOLE, int FROM, int COUNT> __device__ __forceinline__ void put(const float* acc, const Output& out, float2 by, int row, int token) {
  constexpr int TOGETHER = 4;
  acc += 4 * FROM, token += 8 * FROM;
  const int t = threadIdx.x % 4, of_lane = token + threadIdx.x % 32 / 4;
  u16* to = out.y + (size_t)of_lane * out.rows + row + t % 2 * 8 + t / 2 * 4;
  #pragma unroll
  for (int i = 0; i < COUNT; i += TOGETHER) {
    if (!WHOLE) {
      #pragma unroll
      for (int j = i; j < i + TOGETHER; ++j)
        out.put(make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]), by, row, out.place(of_lane + 8 * j));
      continue;
    }
    u32 pairs[TOGETHER][2];  // rows 2t and 2t + 1 of a token, and 8 beyond
    #pragma unroll
    for (int j = 0; j < TOGETHER; ++j) {
      const float* const sums = acc + 4 * (i + j);
      pairs[j][0] = transpose(pack16(sums[0] * by.x, sums[1] * by.x));
      pairs[j][1] = transpose(pack16(sums[2] * by.y, sums[3] * by.y));
    }
    #pragma unroll
    for (int j = 0; j < TOGETHER; ++j) {  // lanes change pairs, and have four rows then
      const u32 got = __shfl_xor_sync(~0u, t % 2 ? pairs[j][0] : pairs[j][1], 1);
      const uint2 four = t % 2 ? make_uint2(got, pairs[j][1]) : make_uint2(pairs[j][0], got);
      if (of_lane + 8 * (i + j) < out.tokens) *(uint2*)to = four;
      to += (size_t)8 * out.rows;
    }
  }
}
// The first row of a tile that is a block's, and a warp's.
__device__ __forceinline__ int block_row(const Work& work, int tile) { return (tile / work.token_blocks * CLUSTER + own_rank()) * ROWS; }
__device__ __forceinline__ int first_row(const Work& work, int tile) { return block_row(work, tile) + threadIdx.x / 32 * 16; }
template <int FROM, int COUNT> __device__ __forceinline__ void put(const float* acc, const Work& work, const Output& out, float2 by, int tile) {
  const int row = first_row(work, tile), token = tile % work.token_blocks * TOKENS;
  const bool whole = out.rows % 4 == 0 && block_row(work, tile) + ROWS <= out.rows;  // the same for all of a block
  if (whole) put<true, FROM, COUNT>(acc, out, by, row, token);
  else put<false, FROM, COUNT>(acc, out, by, row, token);
}
// What a warpgroup has of a tile that its run goes beyond, from unit `begin` of it on.
__device__ __forceinline__ void put_tile(const float* acc, const Work& work, const Output& out, float2 by, float* handed, int tile, int begin) {
  constexpr int ALL = TOKENS / 8;
  if (begin == 0) put<0, ALL>(acc, work, out, by, tile);
  else hand_over_some<0, ALL>(acc, slot_of(handed, own_run()));
}
// Of the run's last tile, from unit `begin` up to `end` of it.
__device__ __forceinline__ void put_last(float* acc, const Work& work, const Output& out, float2 by, float* handed, int tile, int begin, int end) {
  constexpr int ALL = TOKENS / 8, HALF = ALL / 2;
  const int run = own_run();
  float* const slot = slot_of(handed, run);
  if (work.halves()) {
    if (begin == 0) {
      hand_over_some<HALF, HALF>(acc, slot);
      add_up<0, HALF>(acc, handed, run + 1, run + 1);
      put<0, HALF>(acc, work, out, by, tile);
    } else {
      hand_over_some<0, HALF>(acc, slot);
      add_up<HALF, HALF>(acc, handed, run - 1, run - 1);
      put<HALF, HALF>(acc, work, out, by, tile);
    }
    return;
  }
  if (begin > 0) return hand_over_some<0, ALL>(acc, slot);
  if (end < work.col_tiles && !work.long_runs()) add_up<0, ALL>(acc, handed, run + 1, work.owner((tile + 1) * work.col_tiles - 1));
  put<0, ALL>(acc, work, out, by, tile);
}

// Where a warp's codes come from, unit by unit.
struct Stream {
  const Codes& codes;
  int lane, turn;  // turn: the unit with which the next tile begins
  const u8* at;    // a lane's first 16 bytes of the next unit

  __device__ __forceinline__ Stream(const Codes& codes, int unit, int lane) : codes(codes), lane(lane) { find(unit); }
  __device__ __forceinline__ void find(int unit) {
    const int tile = unit / codes.col_tiles, col = unit % codes.col_tiles;
    at = codes.at(tile, col) + 16 * lane;
    turn = unit + codes.col_tiles - col;
  }
  __device__ __forceinline__ void load(u32* r, int unit) {
    load_codes_at(r, at, lane);
    at += TILE_BYTES;
    hold(at);
    if (unit + 1 == turn) find(unit + 1);
  }
};
static constexpr int LOOKED_UP = TOKENS == 128 ? 4 : 2;  // steps ahead of their products, as many as there are registers for
__device__ __forceinline__ void look_up_first(u32* found, const u32* taken, u32 copy) {
  #pragma unroll
  for (int s = 0; s < LOOKED_UP; ++s) look_up(found + 4 * s, taken, s, copy);
}
// By the warps of both groups. While a unit's products run, the next one's codes are taken apart and its first steps' values looked up, and the codes of the one after that are
// under way. A product begins as soon as the one four before it, which has the same registers, is done, so the other three keep the tensor cores busy. Signs wait until then:
// a register that products read is written by an instruction of its own.
__device__ __forceinline__ void multiply_run(const Work& work, u8* memory, const u32* table, const Codes& codes, const Output& out, float* handed) {
  const int lane = keep(threadIdx.x % 32), part = uniform(threadIdx.x / 32) % 4, after = lane + 4;
  const u32 full = shared_address(memory) + BARRIERS_AT, empty = keep(full + 8 * STAGES), copy = keep(own_copy() | shared_address(memory) - TABLE_AT);
  const int run_begin = work.begin(own_run()), end = work.begin(own_run() + 1), taken_up = work.taken_up(own_run());
  // Where there are no signs, that instruction changes no bits, which the assembler does not know. (It would merge it with the load of a pair, and be wrong, or wait for each product.)
  const u32 none = (u32)(out.rows >> 31);
  u32 r[LANE_REGS], taken[TAKEN_WORDS], found[4 * LOOKED_UP], a[16];
  Stream stream(codes, run_begin, lane);
  stream.load(r, run_begin);
  Filler<32 * WARPS>(table).fill(memory);
  sync_warps<32 * WARPS>();
  await_cluster();
  take(taken, r, part, after);
  look_up_first(found, taken, copy);
  stream.load(r, run_begin + 1);
  wait_for_previous();
  int tile = run_begin / work.col_tiles, col = run_begin % work.col_tiles;
  Place place{0, 0};
  bool ready = false;
  float acc[TOKENS / 2];
  float2 by;  // scales of the tile's rows, which would come from far at its end
  int unit = run_begin;
  #pragma unroll 1
  for (;; ++tile, col = 0) {
    const int stop = min(end, unit + work.col_tiles - col);
    if (col == 0 || work.halves()) by = out.scales(first_row(work, tile));
    if (unit == taken_up) take_up(acc, slot_of(handed, own_run() + 1));
    else {
      #pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0;
    }
    settle(acc);
    #pragma unroll 1
    for (; unit < stop; ++unit) {
      const u32 b = TABLE_AT + stage_at(place.stage);
      if (!ready) await(in_shared<u64>(full + 8 * place.stage), place.parity);
      #pragma unroll
      for (int s = 0; s < 4; ++s) {
        await_products<3>();
        u32* const own = found + s % LOOKED_UP * 4;
        settle<4>(own);
        #pragma unroll
        for (int i = 0; i < 4; ++i) a[4 * s + i] = complete(own[i], taken, 4 * s + i, none);
        begin_products();
        multiply(acc, a + 4 * s, describe(b, 16 * s));
        commit_products();
        if (s + LOOKED_UP < 4) look_up(own, taken, s + LOOKED_UP, copy);
      }
      if (lane < CLUSTER) arrive_in(lane, in_shared<u64>(empty + 8 * place.stage));
      if (!BRANCHES) await(in_shared<u64>(full + 8 * place.stage), place.parity);  // it has come: but a loop, ahead of which the assembler puts nothing of what follows
      place.advance();
      take(taken, r, part, after);
      look_up_first(found, taken, copy);
      stream.load(r, unit + 2);
      ready = has_come(in_shared<u64>(full + 8 * place.stage), place.parity);
    }
    await_products<0>();
    settle(acc);
    if (unit == end) break;
    put_tile(acc, work, out, by, handed, tile, col);
  }
  if (lane < CLUSTER) arrive_in(lane, in_shared<u64>(empty + 8 * place.stage));
  put_last(acc, work, out, by, handed, tile, col, end - tile * work.col_tiles);
}

// x [column tiles][padded tokens][64] as rotate.cu has FRAGMENTS; codes, scale and y as in decode.cu. handed: [grid][SLOT] EMPTY, which it is
// again at the end.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
prompt(const u8* codes, const u16* x, const u32* table, const void* scale, u16* y, float* handed, int tokens, int padded, int rows, int row_tiles, int col_tiles) {
  extern __shared__ __align__(1024) u8 memory[];
  if (refuses(memory, y, (size_t)tokens * rows)) return;
  Barriers* const barriers = (Barriers*)(memory + BARRIERS_AT);
  const bool brings = threadIdx.x == 32 * WARPS;
  if (brings) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(barriers->full + i, 1);
      init_barrier(barriers->empty + i, WARPS * CLUSTER + TILES_OF_CODES);
    }
    publish_barriers();
  }
  __syncwarp();
  arrive_at_cluster();
  auto codes_of = [&](int own) { return Codes{codes, TALL == 1 ? row_tiles : (rows + 31) / 32, col_tiles, padded / TOKENS, own_rank() * TILES_OF_CODES + own}; };
  if (threadIdx.x >= 32 * WARPS) {
    leave_registers<LEFT>();
    const Work work(row_tiles, col_tiles, padded / TOKENS);  // here and below: what it computes need not be kept until then
    await_cluster();
    if (brings) bring_run(work, memory, barriers, x, padded);
    const int helper = threadIdx.x - 32 * (WARPS + 1);
    if (helper >= 0 && helper < TILES_OF_CODES) request_run(work, codes_of(helper), barriers);
    return;
  }
  take_registers<TAKEN>();
  const Work work(row_tiles, col_tiles, padded / TOKENS);
  const int warp = uniform(threadIdx.x / 32);
  multiply_run(work, memory, table, codes_of(warp / 4 * TALL + warp % 4 * TALL / 4), Output{y, scale, tokens, rows}, handed);
}
