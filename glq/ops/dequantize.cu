// W = scale · V · R in 16 bits, V in trellis codes: the matrix in the model's own basis, for a product with very many tokens.
//
// A block takes 16 rows of as many columns as the rotation's blocks have. Of each tile of 64 columns a warp decodes its
// rows into fragments and transforms them with tensor cores (16 columns) and sums (64); the rest of the transform, across
// tiles, and the scales and signs come after a trip through shared memory, in fp16.
// Macros, besides those of tiles.cuh: TILES of 64 columns in a block of the rotation: 4, 8, 16 or 32.

static constexpr int WARPS = 8, THREADS = 32 * WARPS;
static constexpr int ROW_WORDS = 32 * TILES + 4;  // of 32 bits that a row takes in shared memory; 4 keep banks apart

// Hadamard transforms across v[…][e], not normalized.
template <int COUNT, int EACH> __device__ __forceinline__ void butterflies(float (*v)[EACH]) {
  #pragma unroll
  for (int h = 1; h < COUNT; h *= 2)
    #pragma unroll
    for (int i = 0; i < COUNT; ++i)
      #pragma unroll
      for (int e = 0; e < EACH; ++e) if (!(i & h)) {
        const float a = v[i][e], b = v[i | h][e];
        v[i][e] = a + b;
        v[i | h][e] = a - b;
      }
}
// Rows 16 slice … of a tile, times the Hadamard matrix of 64, to `out`: the first row's words of the tile.
__device__ __forceinline__ void transform_tile(u32* out, const u8* tile, int slice, u32 copy) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 one = BF16 ? 0x3F803F80u : 0x3C003C00u;
  // The matrix of 16 as an operand: rows 2t and 2t + 1 of column g; rows and columns from 8 on are the same up to signs.
  // Fragments have the bits of a column's number in another order, which is the same to the transform.
  const u32 b = one ^ (u32)(__popc(2 * t & g) & 1) << 15 ^ (u32)(__popc((2 * t + 1) & g) & 1) << 31;
  u32 a[4][4];
  decode_slice(a, tile, slice, copy);
  float c[4][8];
  #pragma unroll
  for (int s = 0; s < 4; ++s) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) c[s][i] = 0;
    mma(c[s], a[s], b, b);
    mma(c[s] + 4, a[s], b, b ^ 0x80008000u);
  }
  butterflies<4>(c);
  #pragma unroll
  for (int i = 0; i < 4; ++i) {  // a lane has 16 columns of two rows
    const int e = i / 2 * 2, s = i % 2 * 2;  // of the fragments
    uint4* const to = (uint4*)(out + (g + e / 2 * 8) * ROW_WORDS + 8 * t + 2 * s);
    *to = make_uint4(halves(c[s][e] / 8, c[s][e + 1] / 8), halves(c[s][e + 4] / 8, c[s][e + 5] / 8),
                     halves(c[s + 1][e] / 8, c[s + 1][e + 1] / 8), halves(c[s + 1][e + 4] / 8, c[s + 1][e + 5] / 8));
  }
}
// The transform across the tiles of a row, of which a lane has two columns each; minus: their signs, a bit a tile.
__device__ __forceinline__ void finish_row(u32* to, const u32* row, float scale, const u32* minus) {
  const int lane = threadIdx.x % 32;
  float v[TILES][2];
  #pragma unroll
  for (int j = 0; j < TILES; ++j) {
    const u32 pair = row[32 * j + lane];
    v[j][0] = from_half((u16)pair);
    v[j][1] = from_half((u16)(pair >> 16));
  }
  butterflies<TILES>(v);
  const float factor = scale * rsqrtf((float)TILES);
  #pragma unroll
  for (int j = 0; j < TILES; ++j) {
    const u32 pair = (u32)to16(v[j][0] * factor) | (u32)to16(v[j][1] * factor) << 16;
    to[32 * j + lane] = pair ^ (minus[0] >> j & 1) << 15 ^ (minus[1] >> j & 1) << 31;
  }
}

// codes [row tiles, column tiles, tile bytes]; out [rows, 64 · col_tiles]; rows of scale and out from the first tile's on.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
dequantize(const u8* codes, const u8* signs, const u32* table, const void* scale, u16* out, int rows, int col_tiles) {
  extern __shared__ __align__(128) u8 memory[];
  u32* const values = (u32*)(memory + TABLE_BYTES);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = col_tiles / TILES;
  let_next_start();
  if (refuses(memory, out, (size_t)rows * col_tiles * 64)) return;
  fill_table(memory, table, THREADS);
  wait_for_previous();
  __syncthreads();
  const u32 copy = own_copy();
  for (int job = blockIdx.x; job < (rows + 15) / 16 * across; job += gridDim.x) {
    const int slices = min(4, (rows + 15) / 16 - job / (4 * across) * 4);  // of this row tile
    const int row_tile = job / (4 * across), left = job - row_tile * 4 * across;
    const int slice = left % slices, first = left / slices * TILES, row = row_tile * 64 + 16 * slice;
    for (int j = warp; j < TILES; j += WARPS)
      transform_tile(values + 32 * j, codes + ((size_t)row_tile * col_tiles + first + j) * TILE_BYTES, slice, copy);
    u32 minus[2] = {0, 0};
    #pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const u32 bits = signs[(first + j) * 8 + lane / 4] >> lane % 4 * 2;
      minus[0] |= (bits & 1) << j;
      minus[1] |= (bits >> 1 & 1) << j;
    }
    __syncthreads();
    for (int r = warp; r < min(16, rows - row); r += WARPS)
      finish_row((u32*)out + ((size_t)(row + r) * col_tiles + first) * 32, values + r * ROW_WORDS, load_scale(scale, row + r), minus);
    __syncthreads();
  }
}
