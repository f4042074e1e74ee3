// W = scale · V in 16 bits: for a product with very many tokens, whose x is rotated before.
//
// A warp decodes a tile of 64 × 64 after the other. Of each row a lane gets 32 bytes; lanes change halves of them by pairs, to
// write whole lines at once.
// Macros: those of tiles.cuh or lattice.cuh.

static constexpr int THREADS = 384;

__device__ __forceinline__ u32 scaled(u32 pair, float scale) {
  return pack16(from16((u16)pair) * scale, from16((u16)(pair >> 16)) * scale);
}
// v: 32 bytes at `to`, of which the lane four before or after writes one half, and this one a half of its, in the row before or
// after: a warp writes all of four rows at once.
__device__ __forceinline__ void write_rows(u16* to, size_t row_length, const u32* v, bool odd) {
  u32 got[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) got[i] = __shfl_sync(~0u, odd ? v[i] : v[i + 4], (threadIdx.x ^ 4) & 31);
  u16* const of_even = (odd ? to - row_length : to) + 8 * odd;
  *(uint4*)of_even = odd ? make_uint4(got[0], got[1], got[2], got[3]) : make_uint4(v[0], v[1], v[2], v[3]);
  *(uint4*)(of_even + row_length) = odd ? make_uint4(v[4], v[5], v[6], v[7]) : make_uint4(got[0], got[1], got[2], got[3]);
}
// codes as docs/FORMAT.md has them; row_tiles: of 64 rows; out [64 · row tiles, 64 · col_tiles]; scale of the first `rows` rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
dequantize(const u8* codes, const u32* table, const void* scale, u16* out, int rows, int row_tiles, int col_tiles) {
  extern __shared__ __align__(128) u8 memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, warps = gridDim.x * (THREADS / 32);
  let_next_start();
  if (refuses(memory, out, (size_t)row_tiles * col_tiles * 4096)) return;
  Filler<THREADS>(table).fill(memory);
  wait_for_previous();
  __syncthreads();
  const u32 copy = own_copy();
  const Loader loader(codes, rows, col_tiles);
  auto place = [&](int tile) { return codes + ((size_t)tile + (TALL - 1) * (tile / col_tiles) * (size_t)col_tiles) * TILE_BYTES; };
  u32 r[REGS];
  int tile = blockIdx.x * (THREADS / 32) + warp;
  if (tile < row_tiles * col_tiles) loader.load(r, place(tile), lane);
  #pragma unroll 1
  for (; tile < row_tiles * col_tiles; tile += warps) {
    const int row = tile / col_tiles * 64 + g, col = tile % col_tiles * 64 + 16 * t;
    float scales[8];
    #pragma unroll
    for (int i = 0; i < 8; ++i) scales[i] = row + 8 * i < rows ? load_scale(scale, row + 8 * i) : 0;
    u16* const to = out + (size_t)row * col_tiles * 64 + col;
    const bool more = tile + warps < row_tiles * col_tiles;
    const u8* const next = place(tile + warps);
    u32 v[8][8];  // of eight rows of this lane
    #pragma unroll
    for (int s = 0; s < 4; ++s) {
      u32 held[OF_STEP];
      begin_step(held, r, s);
      #pragma unroll
      for (int m = 0; m < 4; ++m) {
        u32 a[4];
        fragment(a, held, r, s, m, copy);
        #pragma unroll
        for (int e = 0; e < 4; ++e) v[2 * m + e % 2][2 * s + e / 2] = scaled(a[e], scales[2 * m + e % 2]);
      }
      if (more) loader.load_used(r, next, lane, s);
    }
    #pragma unroll
    for (int i = 0; i < 8; ++i) write_rows(to + (size_t)i * 8 * col_tiles * 64, col_tiles * 64, v[i], g % 2);
  }
}
