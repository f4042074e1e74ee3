// W = scale · V · R in 16 bits, V in trellis codes: the matrix in the model's own basis, so that x need not be rotated.
//
// A slice is 16 rows of 32 column tiles. Each of 16 warps decodes two tiles' part of it into fragments and transforms the 64
// columns of a tile: 16 by tensor cores, 4 by sums. The rest of the transform, across tiles, is a product of tensor cores, too,
// after a trip through shared memory in fp16, a row a warp. Blocks have equal runs of slices; four have the same codes.
// Macros, besides those of tiles.cuh, of which BF16 is 0: OUT_BF16, BLOCK_TILES (of the rotation: 1, 2, 4, 8, 16 or 32), BUFFERS
// (of values in shared memory: 1 or 2).

static constexpr int WARPS = 16, THREADS = 32 * WARPS, TILES = 2 * WARPS;
static constexpr int ROW_WORDS = 32 * TILES + 8;  // of pairs of fp16 that a row takes in shared memory; 8 keep banks apart
static constexpr int BUFFER_WORDS = 16 * ROW_WORDS;

// ---- codes ----

static constexpr int MOVED = CODE_BITS / 4;  // bits of a word that a slice has

// Word i of a lane's string, which begins at any bit.
__device__ __forceinline__ uint2 word_of(const u32* r, int i) {
  u32 w[2];
  #pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int at = CODE_BITS * i + 32 * j, left = CODE_BITS - 32 * j;
    if (left <= 0) w[j] = 0;
    else w[j] = __funnelshift_r(r[at / 32], r[min(at / 32 + 1, REGS - 1)], at % 32) & (left < 32 ? (1u << left % 32) - 1 : ~0u);
  }
  return make_uint2(w[0], w[1]);
}
// Register e of the fragment of step s, of words that begin with the slice.
__device__ __forceinline__ u32 pair_of(const u32* word, int e, u32 copy) {
  const int at = CODE_BITS * (e % 2) / 8;
  return value(HASH * bits16(word, at), copy);
}

// A lane's words of a tile: the strips that begin with them, as many bits as a word has. Slices take the same instructions,
// since the strips move on from one to the next.
struct Words {
  u32 w[8][2];  // first, as load_codes has them

  __device__ __forceinline__ void load(const u8* tile, int lane) { load_codes(w[0], tile, lane); }
  __device__ __forceinline__ void separate() {
    u32 r[REGS];
    #pragma unroll
    for (int i = 0; i < REGS; ++i) r[i] = w[i / 2][i % 2];
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 word = word_of(r, i);
      w[i][0] = word.x, w[i][1] = word.y;
    }
  }
  __device__ __forceinline__ void move_on() {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 next = __shfl_sync(~0u, w[i][0], (threadIdx.x + 4) & 31) & ((1u << MOVED) - 1);  // of the next row
      const unsigned long long moved = ((unsigned long long)w[i][1] << 32 | w[i][0]) >> MOVED | (unsigned long long)next << (CODE_BITS - MOVED);
      w[i][0] = (u32)moved;
      w[i][1] = (u32)(moved >> 32);
    }
  }
  __device__ __forceinline__ u32 pair(int s, int e, u32 copy) const { return pair_of(w[2 * s + e / 2], e, copy); }
};

// ---- first pass: within a tile ----

// The Sylvester matrix of 16, over 8, as an operand: rows 2t and 2t + 1 of column g. Rows and columns from 8 on are the same up
// to signs. Fragments have the bits of a column's number in another order, which is the same to the transform.
__device__ __forceinline__ u32 sylvester(int g, int t) {
  return 0x30003000u ^ (u32)(__popc(2 * t & g) & 1) << 15 ^ (u32)(__popc((2 * t + 1) & g) & 1) << 31;
}
__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}
// c[s][…]: columns 16t + 4s + … of rows g and g + 8 of a tile, transformed.
__device__ __forceinline__ void transform_tile(float (*c)[8], const Words& words, u32 copy, u32 b) {
  #pragma unroll
  for (int s = 0; s < 4; ++s) {
    u32 a[4];
    #pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = words.pair(s, e, copy);
    #pragma unroll
    for (int i = 0; i < 8; ++i) c[s][i] = 0;
    mma(c[s], a, b, b);
    mma(c[s] + 4, a, b, b ^ 0x80008000u);
  }
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    butterfly(c[0][i], c[1][i]);
    butterfly(c[2][i], c[3][i]);
    butterfly(c[0][i], c[2][i]);
    butterfly(c[1][i], c[3][i]);
  }
}
// Where column `col` of a tile lies in what a row has of two tiles, as pairs: so that second_pass reads 16 bytes a lane. Bits
// 1, 2, 5, 0, 3, 4 of the column, the lowest first; and 3 changes with 4, which keeps banks apart.
__device__ __forceinline__ int place_of_column(int col) {
  const int high = col >> 3 & 3;
  return (col >> 1 & 3) | (col >> 5 & 1) << 2 | (col & 1) << 3 | (high ^ high >> 1) << 4;
}
// And the banks of pairs of tiles.
__device__ __forceinline__ int swizzle(int pair) { return (pair & 1) << 2 | (pair & 2) << 3; }

__device__ __forceinline__ void first_pass(u32* values, const Words* words, u32 copy, u32 b, int warp) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float c[2][4][8];
  transform_tile(c[0], words[0], copy, b);
  transform_tile(c[1], words[1], copy, b);
  #pragma unroll
  for (int half = 0; half < 2; ++half)  // rows g and g + 8
    #pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns 16t + i % 2 + 8 (i / 2), and those 2, 4 and 6 after
      u32 w[4];
      #pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int s = i / 2 * 2 + k / 2, e = k % 2 * 4 + 2 * half + i % 2;
        w[k] = pack_half(c[0][s][e], c[1][s][e]);
      }
      const int at = place_of_column(16 * t + i % 2 + i / 2 * 8) ^ swizzle(warp);
      *(uint4*)(values + (g + 8 * half) * ROW_WORDS + 64 * warp + at) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// ---- second pass: across tiles ----

// The Sylvester matrix across 16 tiles, in blocks of BLOCK_TILES, as the left operand; of 32 tiles only the last quarter differs: -.
__device__ __forceinline__ void across_tiles(u32* a, int g, int t) {
  #pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int to = g + e % 2 * 8, from = 2 * t + e / 2 * 8;
    a[e] = 0;
    #pragma unroll
    for (int i = 0; i < 2; ++i)
      if (to / BLOCK_TILES == (from + i) / BLOCK_TILES) a[e] |= (0x3C00u | (u32)(__popc(to & (from + i) & (BLOCK_TILES - 1)) & 1) << 15) << 16 * i;
  }
}
__device__ __forceinline__ u32 pack_out(float low, float high) { return OUT_BF16 ? pack_bf16(low, high) : pack_half(low, high); }
// The signs of a lane's columns in second_pass: of 32 half + 8t … 32 half + 8t + 7 in tiles g, g + 8, g + 16 and g + 24.
struct Signs {
  u32 bits[2];  // of each half; of tile g + 8k and column pair i: bits 15 − 4k − i and 31 − 4k − i

  // from: where those of the first tile begin, a bit each, of `tiles` tiles.
  __device__ __forceinline__ void take(const u8* from, int tiles) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      bits[half] = 0;
      #pragma unroll
      for (int k = 0; k < 4; ++k) {
        const u32 byte = g + 8 * k < tiles ? from[8 * (g + 8 * k) + 4 * half + t] : 0;
        #pragma unroll
        for (int i = 0; i < 4; ++i) bits[half] |= (byte >> 2 * i & 1) << (15 - 4 * k - i) | (byte >> (2 * i + 1) & 1) << (31 - 4 * k - i);
      }
    }
  }
  __device__ __forceinline__ u32 flip(u32 pair, int half, int k, int i) const { return pair ^ (bits[half] << (4 * k + i) & 0x80008000u); }
};
// A row of 32 tiles, of which `tiles` there are, to `to`.
__device__ __forceinline__ void second_pass(u16* to, const u32* row, const Signs& signs, float factor, const u32* a, int tiles) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  #pragma unroll
  for (int half = 0; half < 2; ++half) {  // columns 32 half … of all tiles
    u32 b[4][4];  // [pairs of tiles t, t + 4, …][columns 2i more]
    #pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int pair = 4 * p + t, at = (g % 2 << 3 | (g / 2 ^ g / 4) << 4 | half << 2) ^ swizzle(pair);
      const uint4 v = *(const uint4*)(row + 64 * pair + at);
      b[p][0] = v.x, b[p][1] = v.y, b[p][2] = v.z, b[p][3] = v.w;
    }
    #pragma unroll
    for (int mt = 0; mt < 2; ++mt) {
      float c[4][4] = {};
      #pragma unroll
      for (int i = 0; i < 4; ++i)
        #pragma unroll
        for (int ks = 0; ks < 2; ++ks) {
          const u32 flip = BLOCK_TILES == 32 && mt && ks ? 0x80008000u : 0;
          if (BLOCK_TILES == 32 || mt == ks) mma(c[i], a, b[2 * ks][i] ^ flip, b[2 * ks + 1][i] ^ flip);
        }
      #pragma unroll
      for (int e = 0; e < 4; e += 2) {  // columns 32 half + 8t … of tile g, and of that 8 tiles after
        const int k = 2 * mt + e / 2, tile = g + 8 * k;
        u32 v[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = signs.flip(pack_out(c[i][e] * factor, c[i][e + 1] * factor), half, k, i);
        if (tile < tiles) *(uint4*)(to + 64 * tile + 32 * half + 8 * t) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
}

// codes [row tiles, column tiles, tile bytes]; out [rows, 64 · col_tiles].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
unrotate(const u8* codes, const u8* signs, const u32* table, const void* scale, u16* out, int rows, int col_tiles) {
  extern __shared__ __align__(128) u8 memory[];
  u32* const values = (u32*)(memory + TABLE_BYTES);
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4;
  const int across = (col_tiles + TILES - 1) / TILES, slices = 4 * ((rows + 63) / 64) * across;
  const int begin = (int)((long long)slices * blockIdx.x / gridDim.x), end = (int)((long long)slices * (blockIdx.x + 1) / gridDim.x);
  let_next_start();
  if (refuses(memory, out, (size_t)rows * col_tiles * 64)) return;
  Filler<THREADS>(table).fill(memory);
  const u32 copy = own_copy(), b = sylvester(g, t);
  u32 a[4];
  Words words[2] = {};
  Signs own;
  across_tiles(a, g, t);
  auto buffer = [&](int slice) { return values + (BUFFERS == 2 ? slice % 2 * BUFFER_WORDS : 0); };
  auto load = [&](int slice) {  // the codes of a slice's tiles; columns that do not exist: any values
    const int first = slice / 4 % across * TILES + 2 * warp;
    const u8* const tile = codes + ((size_t)(slice / 4 / across) * col_tiles + first) * TILE_BYTES;
    if (first < col_tiles) words[0].load(tile, lane);
    if (first + 1 < col_tiles) words[1].load(tile + TILE_BYTES, lane);
  };
  auto first = [&](int slice) {
    if (slice % 4 == 0 || slice == begin)
      for (Words& w : words) w.separate();
    #pragma unroll 1
    for (int moves = slice == begin ? slice % 4 : min(slice % 4, 1); moves; --moves)
      for (Words& w : words) w.move_on();
    first_pass(buffer(slice), words, copy, b, warp);
    if (slice % 4 == 3 && slice + 1 < end) load(slice + 1);
  };
  auto second = [&](int slice) {
    const int col = slice / 4 % across * TILES, row = slice / 4 / across * 64 + slice % 4 * 16 + warp, tiles = min(TILES, col_tiles - col);
    if (slice % 4 == 0 || slice == begin) own.take(signs + 8 * col, tiles);
    const float factor = row < rows ? load_scale(scale, row) * rsqrtf((float)BLOCK_TILES) : 0;
    if (row < rows) second_pass(out + ((size_t)row * col_tiles + col) * 64, buffer(slice) + warp * ROW_WORDS, own, factor, a, tiles);
  };
  if (begin < end) load(begin);
  wait_for_previous();
  __syncthreads();
  // Between two barriers a warp decodes the next slice and transforms this one. Half of the warps do the latter first, so that
  // every quarter of the multiprocessor has something of either to do. With one buffer, all do it first, and wait for each other.
  #pragma unroll 1
  for (int step = 0; step < 2 * (end - begin) + 2; ++step) {
    const bool is_second = BUFFERS == 1 || warp / 4 % 2 ? step % 2 == 0 : step % 2 == 1;
    const int slice = begin + step / 2 - is_second;
    if (is_second) {
      if (slice >= begin) second(slice);
    } else if (slice < end) first(slice);
    if (BUFFERS == 1 || step % 2 == 1) __syncthreads();
  }
}
