// y = x Vᵀ · scale for many tokens on Hopper: x comes rotated, V in trellis codes, which go straight into the operands of wgmma.
//
// A tile of y is 64 rows a warpgroup × TOKENS tokens; a unit is one step of it, 64 columns. Units, tile after tile, are cut
// into as many equal runs as there are blocks. While a warpgroup's products of one unit run, its warps decode the next one,
// 16 rows each. Codes and x come through a ring of STAGES in shared memory; who reads a stage last, requests it anew.
// Where several blocks have units of one tile, the one with its first unit adds up what they have (exchange.cuh), always in
// the same order. The first blocks have the last runs: so each hands over what is needed elsewhere before anything else, and
// a tile whose sums come from others, which are blocks before it, is its last.
// Macros, besides those of tiles.cuh: TOKENS (64, 96, 128, 192 or 256), WARPGROUPS, STAGES.

static constexpr int THREADS = 128 * WARPGROUPS, ROWS = 64 * WARPGROUPS;
static constexpr int X_STAGE = TOKENS * 128, CODE_STAGE = WARPGROUPS * TILE_BYTES;  // bytes
static constexpr int SLOT = ROWS * TOKENS;  // floats of a tile's sums

// ---- which units a run has ----

struct Work {
  int units, row_tiles, col_tiles, token_blocks;

  __device__ Work(int row_tiles, int col_tiles, int token_blocks) : row_tiles(row_tiles), col_tiles(col_tiles), token_blocks(token_blocks) {
    units = (row_tiles + WARPGROUPS - 1) / WARPGROUPS * token_blocks * col_tiles;
  }
  __device__ int begin(int run) const { return (int)((long long)units * run / (int)gridDim.x); }
  __device__ int owner(int unit) const { return (int)(((long long)(unit + 1) * (int)gridDim.x - 1) / units); }
};

// ---- what they read ----

// The unit to be requested next, and where it goes.
struct Cursor {
  int left, col, token_block, row_block, stage;

  __device__ __forceinline__ void advance(const Work& work) {
    --left;
    if (++stage == STAGES) stage = 0;
    if (++col < work.col_tiles) return;
    col = 0;
    if (++token_block < work.token_blocks) return;
    token_block = 0;
    ++row_block;
  }
};
struct Meeting {  // in shared memory: of the threads
  u64 full[STAGES];
  u32 readers[STAGES];
  Cursor next;
};
struct Ring {
  const Work& work;
  const u8* codes;
  const u16* x;
  u8 *x_stages, *code_stages;
  u64* full;
  u32* readers;  // warps that are done with a stage
  Cursor* next;

  // By one thread.
  __device__ __forceinline__ void request_codes(const Cursor& c) const {
    if (c.left <= 0) return;
    #pragma unroll
    for (int i = 0; i < WARPGROUPS; ++i) {
      const int row = min(c.row_block * WARPGROUPS + i, work.row_tiles - 1);
      copy_bulk(stage_codes(c.stage) + i * TILE_BYTES, codes + ((size_t)row * work.col_tiles + c.col) * TILE_BYTES, TILE_BYTES, full + c.stage);
    }
  }
  __device__ __forceinline__ void request_x(const Cursor& c) const {
    const size_t block = (size_t)c.col * work.token_blocks + c.token_block;
    if (c.left > 0) copy_bulk(x_stages + c.stage * X_STAGE, x + block * TOKENS * 64, X_STAGE, full + c.stage);
  }
  __device__ __forceinline__ u8* stage_codes(int stage) const { return code_stages + stage * CODE_STAGE; }
  __device__ __forceinline__ u32 stage_x(int stage) const { return shared_address(x_stages + stage * X_STAGE); }
  __device__ __forceinline__ void await_unit(int n) const { await(full + n % STAGES, n / STAGES & 1); }
  // By every warp that has read the run's n-th unit.
  __device__ __forceinline__ void release(int n) const {
    if (threadIdx.x % 32 || !count_to(readers + n % STAGES, THREADS / 32 - 1)) return;
    Cursor c = *next;
    request_codes(c);
    request_x(c);
    c.advance(work);
    *next = c;
  }
};

// ---- the product ----

// acc += the warpgroup's rows · x, units n … end - 1 of the run. Registers of products that run are left alone, so that
// decoding takes turns between two sets.
__device__ __forceinline__ void multiply_units(float* acc, int n, int end, const Ring& ring, u32 copy) {
  const int warp = threadIdx.x / 32;
  u32 even[4][4], odd[4][4];
  auto decode = [&](u32 (*a)[4], int n) {
    ring.await_unit(n);
    decode_slice(a, ring.stage_codes(n % STAGES) + warp / 4 * TILE_BYTES, warp % 4, copy);
  };
  auto multiply_by = [&](const u32 (*a)[4], int n) {
    const u32 at = ring.stage_x(n % STAGES);
    begin_products();
    #pragma unroll
    for (int s = 0; s < 4; ++s) multiply(acc, a[s], describe(at, 16 * s));
    commit_products();
  };
  decode(even, n);
  multiply_by(even, n);
  while (++n < end) {
    decode(odd, n);
    multiply_by(odd, n);
    await_products<1>();
    ring.release(n - 1);
    if (++n == end) break;
    decode(even, n);
    multiply_by(even, n);
    await_products<1>();
    ring.release(n - 1);
  }
  await_products<0>();
  ring.release(end - 1);
}

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
// acc += what other blocks hand over, in the slots from `first` to `last`.
__device__ __forceinline__ void add_up(float* acc, float* handed, int first, int last) {
  constexpr int AT_ONCE = TOKENS % 64 ? 6 : 8;
  static_assert(TOKENS / 8 % AT_ONCE == 0, "all of a thread's sums");
  #pragma unroll 1
  for (int slot = first; slot <= last; ++slot) {
    float* const from = handed + (size_t)slot * SLOT + place_in_slot();
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

// x [column tiles][padded tokens][64], chunks of 16 bytes swizzled, columns in the order of the fragments; codes, scale and y
// as in decode.cu. handed: [grid][SLOT] EMPTY, which it is again at the end.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
prefill(const u8* codes, const u16* x, const u32* table, const void* scale, u16* y, float* handed,
        int tokens, int padded, int rows, int row_tiles, int col_tiles) {
  extern __shared__ __align__(1024) u8 memory[];
  let_next_start();
  if (refuses(memory, y, (size_t)tokens * rows)) return;
  const Work work(row_tiles, col_tiles, padded / TOKENS);
  const Output out{y, scale, tokens, rows};
  const int run = gridDim.x - 1 - blockIdx.x, begin = work.begin(run), end = work.begin(run + 1), warp = threadIdx.x / 32;
  u8 *const x_stages = memory + TABLE_BYTES, *const code_stages = x_stages + STAGES * X_STAGE;
  Meeting& meeting = *(Meeting*)(code_stages + STAGES * CODE_STAGE);
  const Ring ring{work, codes, x, x_stages, code_stages, meeting.full, meeting.readers, &meeting.next};
  const Cursor first{end - begin, begin % col_tiles, begin / col_tiles % work.token_blocks, begin / col_tiles / work.token_blocks, 0};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(meeting.full + i, 1 + WARPGROUPS);
      meeting.readers[i] = 0;
    }
    publish_barriers();
    Cursor c = first;  // the codes do not wait for the kernel ahead
    for (int i = 0; i < STAGES; ++i, c.advance(work)) ring.request_codes(c);
  }
  fill_table(memory, table, THREADS);
  wait_for_previous();
  if (threadIdx.x == 0) {
    Cursor c = first;
    for (int i = 0; i < STAGES; ++i, c.advance(work)) ring.request_x(c);
    meeting.next = c;
  }
  __syncthreads();
  const u32 copy = own_copy();
  float acc[TOKENS / 2];
  for (int unit = begin; unit < end;) {
    const int tile = unit / col_tiles, tile_begin = tile * col_tiles, tile_end = tile_begin + col_tiles, stop = min(end, tile_end);
    #pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0;
    multiply_units(acc, unit - begin, stop - begin, ring, copy);
    if (unit > tile_begin) hand_over_all(acc, handed + (size_t)run * SLOT);
    else {
      if (stop < tile_end) add_up(acc, handed, run + 1, work.owner(tile_end - 1));
      out.put(acc, tile / work.token_blocks * ROWS + 16 * warp, tile % work.token_blocks * TOKENS);
    }
    unit = stop;
  }
}
