// The rotation of x, in a launch of its own, and the order in which the kernels want it.
// Macros, besides those of input.cuh: CHUNKS (of 256 columns in a block of the rotation, for rotate_chunks); LAYOUT: TILES of
// 64 columns for decode.cu, in rows of 72, of which the last 8 keep banks apart; SWIZZLED and FRAGMENTS, in rows of 64, ordered and
// swizzled for prefill.cu and batch.cu; ROWS, x as it was. GATHER (0 or 1): whether rotate_many takes rows of x in another order.

static constexpr int TILES = 0, SWIZZLED = 1, FRAGMENTS = 2;

// Where a column of a token lies.
__device__ __forceinline__ size_t place(int col, int token, int held, int tiles) {
  if (LAYOUT == TILES) return ((size_t)(col / 64) * held + token) * 72 + col % 64;
  if (LAYOUT != SWIZZLED && LAYOUT != FRAGMENTS) return (size_t)token * tiles * 64 + col;
  const int c = col % 64;
  const int at = LAYOUT == SWIZZLED ? c / 32 * 32 + c / 4 % 4 * 8 + c / 16 % 2 * 4 + c % 4  // as place_of_step has them
                                    : c / 4 % 4 * 16 + c / 2 % 2 * 8 + c / 16 * 2 + c % 2;  // as a step's fragment has them
  return ((size_t)(col / 64) * held + token) * 64 + (at ^ token % 8 * 8);
}

// In FRAGMENTS four lanes, every second of eight, have eight columns each, 16 from one to the next: their t-th pairs make a chunk. They are transposed,
// and the t-th lane puts the t-th of the chunks. half: of the first 16 columns, which eight.
__device__ __forceinline__ void put_chunk(u16* out, int tile, int token, int held, int half, u32* pairs) {
  const int lane = threadIdx.x % 32, t = lane / 2 % 4;
  #pragma unroll
  for (int d = 1; d < 4; d *= 2)
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const u32 got = __shfl_sync(~0u, t & d ? pairs[i] : pairs[i + d], lane ^ 2 * d);
      if (t & d) pairs[i] = got;
      else pairs[i + d] = got;
    }
  *(uint4*)(out + ((size_t)tile * held + token) * 64 + (half * 4 + t ^ token % 8) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// x [tokens, cols] → rotated, filled up to whole tiles of 64 columns; blocks of odd · pow columns, hartley [odd, odd] fp32 orthonormal.
// One block of threads a token and block of columns; 2 · width floats of shared memory.
extern "C" __global__ void __launch_bounds__(256)
rotate_tiles(const u16* x, const u8* signs, const float* hartley, u16* out, int held, int cols, int width, int odd) {
  extern __shared__ __align__(128) float values[];
  let_next_start();
  const int token = blockIdx.x, start = blockIdx.y * width, pow = width / odd, tiles = (cols + 63) / 64;
  float* from = values, * to = values + width;
  wait_for_previous();
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const int col = start + i;
    const float f = from16(x[(size_t)token * cols + col]);
    from[i] = signs[col / 8] >> (col % 8) & 1 ? -f : f;
  }
  __syncthreads();
  for (int h = 1; h < pow; h *= 2) {  // pairs of one step are a thread's own
    for (int i = threadIdx.x; i < width / 2; i += blockDim.x) {
      const int lo = i / h * 2 * h + i % h;
      const float a = from[lo], b = from[lo + h];
      from[lo] = a + b;
      from[lo + h] = a - b;
    }
    __syncthreads();
  }
  if (odd > 1) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      float sum = 0;
      for (int a = 0; a < odd; ++a) sum += hartley[i / pow * odd + a] * from[a * pow + i % pow];
      to[i] = sum;
    }
    __syncthreads();
    from = to;
  }
  const float norm = rsqrtf((float)pow);
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const int col = start + i;
    out[place(col, token, held, tiles)] = to16(from[i] * norm);
  }
  if (start + width == cols)  // columns that fill up the last tile
    for (int col = cols + threadIdx.x; col < 64 * tiles; col += blockDim.x) out[place(col, token, held, tiles)] = 0;
}

static constexpr int WIDTH = 256 * CHUNKS;
__device__ __forceinline__ float norm() { return rsqrtf((float)(WIDTH / odd_part(CHUNKS))); }

// The same where width is 256 · CHUNKS: one warp for 256 columns. With 2 KB of shared memory and few registers, so that it starts where
// the product ahead of it leaves a little room, and is there when that ends.
extern "C" __global__ void __launch_bounds__(32 * CHUNKS)
rotate_chunks(const u16* x, const u16* other, const u16* weight, u16* total, const u8* signs, u16* out, int eps, int stride, int held, int cols) {
  __shared__ float2 values[CHUNKS][32];
  let_next_start();
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, col = blockIdx.y * WIDTH + 256 * warp + 8 * lane;
  float factors[CHUNKS];
  row_across<CHUNKS>(factors, warp);
  const Input input(x, other, weight, total, eps, stride, token, cols);
  Eight own;
  own.request_constants(input, signs, col);
  float v[8], by = norm();
  wait_for_previous();
  own.request(input, col);
#if INPUT == 2
  float squares[CHUNKS];  // by way of what is needed later: with the block's reserved KB there are 3 KB beside the largest products
  const float sum = sum_squares(input, cols, threadIdx.x, 32 * CHUNKS, blockIdx.y * WIDTH, (blockIdx.y + 1) * WIDTH);
  if (lane == 0) values[warp][0].x = sum;
  __syncthreads();
  #pragma unroll
  for (int c = 0; c < CHUNKS; ++c) squares[c] = values[c][0].x;
  by *= inverse_norm<CHUNKS>(squares, cols, input.eps);
  __syncthreads();
#endif
  own.take(v);
  hadamard256(v, lane);
  #pragma unroll
  for (int i = 0; i < 8; i += 2) {
    if (i > 0 && CHUNKS > 1) __syncthreads();
    values[warp][lane] = make_float2(v[i], v[i + 1]);
    if (CHUNKS > 1) __syncthreads();
    v[i] = v[i + 1] = 0;
    #pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const float2 two = values[c][lane];
      v[i] += factors[c] * two.x;
      v[i + 1] += factors[c] * two.y;
    }
  }
  u32 pairs[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack16(v[2 * i] * by, v[2 * i + 1] * by);
#if LAYOUT == 1
  const bool late = lane / 2 % 2;  // lanes with the first and the second half of chunks change pairs, and write 16 bytes
  const u32 first = __shfl_sync(~0u, late ? pairs[0] : pairs[2], lane ^ 2), second = __shfl_sync(~0u, late ? pairs[1] : pairs[3], lane ^ 2);
  const int chunk = lane % 8 / 4 * 4 + lane % 2 * 2 + late;
  u16* const to = out + ((size_t)(col / 64) * held + token) * 64 + (chunk ^ token % 8) * 8;
  *(uint4*)to = late ? make_uint4(first, second, pairs[2], pairs[3]) : make_uint4(pairs[0], pairs[1], first, second);
#elif LAYOUT == 2
  put_chunk(out, col / 64, token, held, lane % 2, pairs);
#else
  *(uint4*)(out + place(col, token, held, cols / 64)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
}

// The same for many tokens, eight at once. Tensor cores transform along four bits of a column's number, which lie within 16 bytes of
// four lanes: x as it is in memory is an operand. Along the others a lane has all values: first of the 256 columns of a warp,
// then, through shared memory, of all CHUNKS. A lane's column of a token, by bits from the lowest: 0, 3 and 4 are those of the lane's
// group of four, 1 that of the register, 2 that of one of two products, 5 to 7 that of one of eight times 16 bytes.
static constexpr int TOGETHER = 8;  // tokens
// Then a lane has columns that make 16 bytes of the order in which they are wanted: all with the same bits but 0 and these two, the higher of which says which two
// of four pairs. Two columns lie together that differ in TWO, along which a lane had both before.
static constexpr int TWO = LAYOUT == FRAGMENTS ? 5 : 1, OTHER = LAYOUT == FRAGMENTS || LAYOUT == SWIZZLED ? 4 : 2;
// What is left of a column's number in a tile: 3, and
static constexpr int P = LAYOUT == FRAGMENTS ? 1 : LAYOUT == SWIZZLED ? 2 : 4, Q = LAYOUT == FRAGMENTS ? 2 : 5;
static constexpr int SLOTS = 128 * TOGETHER;  // of a chunk, for two columns of a token each

// Where in a chunk they lie, so that lanes that write or read at once, 16 of them, have different banks: those that write differ in bits 0 and 3 of the column
// and the upper two of the token, those that read in 3, P and Q and the middle one of the token. Bits of the sum of two numbers are those of both.
__device__ __forceinline__ constexpr int slot_of(int col, int token) {
  const int p = col >> P & 1, q = col >> Q & 1;
  return (col >> 3 & 1) | token / 2 % 2 << 1 | (col & 1 ^ p) << 2 | (token / 4 ^ q) << 3 | p << 4 | q << 5 | token % 2 << 6 | (col >> OTHER & 1) << 7 | col / 64 << 8;
}

// GATHER: token i is row pairs[i] / each of x, or none (−1), up to blocks[0] times `tokens`.
extern "C" __global__ void __launch_bounds__(32 * CHUNKS, 16 / CHUNKS)
rotate_many(const u16* x, const u8* signs, u16* out, const int* blocks, const int* pairs, int each, int held, int cols, int tokens) {
  extern __shared__ __align__(128) float2 twos[];  // [CHUNKS][SLOTS], then which of two columns change their sign, [WIDTH / 2]
  let_next_start();
  u32* const negative = (u32*)(twos + CHUNKS * SLOTS);
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4, start = blockIdx.y * WIDTH;
  u32 bits[4];  // on their way while x is
  #pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = signs[(start + 256 * warp + 64 * i) / 8 + lane / 4];
  u32 hadamard16[4];
  sylvester16(hadamard16, lane, ONES);
  uint4 raw[8];
  auto request = [&](int first) {
    int row = first + g < tokens ? first + g : -1;
    if (GATHER && row >= 0) row = pairs[row] < 0 ? -1 : pairs[row] / each;
    const uint4* from = (const uint4*)(x + (size_t)row * cols + start + 256 * warp + 8 * t);
    hold(from);
    #pragma unroll
    for (int q = 0; q < 8; ++q) {
      raw[q] = make_uint4(0, 0, 0, 0);
      if (row >= 0) load_now(raw[q], from + 4 * q);
    }
  };
  wait_for_previous();
  if (GATHER) tokens *= blocks[0];
  request(blockIdx.x * TOGETHER);
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 two = bits[i] >> 2 * lane % 8;
    negative[128 * warp + 32 * i + lane] = (two & 1) << 15 | (two & 2) << 30;
  }
  __syncwarp();
  #pragma unroll 1
  for (int first = blockIdx.x * TOGETHER; first < tokens; first += gridDim.x * TOGETHER) {
    float v[4][16] = {};  // of bit 1, and the lower of two tokens or the other; bits 2, 5, 6, 7
    #pragma unroll
    for (int q = 0; q < 8; ++q) {
      const uint4 by = ((const uint4*)negative)[32 * warp + 4 * q + t];
      #pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sums[4] = {0, 0, 0, 0};
        mma(sums, hadamard16, h ? raw[q].z ^ by.z : raw[q].x ^ by.x, h ? raw[q].w ^ by.w : raw[q].y ^ by.y);
        #pragma unroll
        for (int e = 0; e < 4; ++e) v[e][2 * q + h] = sums[e];
      }
    }
    request(first + gridDim.x * TOGETHER);
    #pragma unroll
    for (int e = 0; e < 4; ++e) hadamard<16>(v[e]);
    float2* const own = twos + warp * SLOTS;
    const int written = slot_of(g % 2 | g / 2 << 3, 2 * t);
    #pragma unroll
    for (int i = 0; i < 32; ++i) {  // all columns of a lane's that have no TWO, of both tokens
      const int e = i % 2, col = TWO == 5 ? i / 2 % 4 << 1 | i / 8 << 6 : i / 2 % 2 << 2 | i / 4 << 5, slot = slot_of(col, e);
      auto value = [&](int col) { return v[col / 2 % 2 * 2 + e][col / 32 * 2 + col / 4 % 2]; };
      own[(written ^ slot % 16) + slot / 16 * 16] = make_float2(value(col), value(col | 1 << TWO));
    }
    __syncthreads();
    #pragma unroll 1
    for (int i = warp; i < 8; i += CHUNKS) {  // which tile of a chunk, and whether odd tokens
      const int col = lane % 2 << P | lane / 2 % 2 << Q | lane / 4 % 2 << 3 | i % 4 << 6, token = i / 4 | lane / 8 << 1, at = slot_of(col, token);
      if (first + token >= tokens || GATHER && pairs[first + token] < 0) continue;
      float w[2][4][CHUNKS];
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 two = twos[c * SLOTS + (at ^ slot_of(j % 2, 0)) + slot_of(j / 2 << OTHER, 0)];
          const int other = j / 2 << (OTHER > TWO);
          w[j % 2][other][c] = two.x, w[j % 2][other | 1 << (TWO > OTHER)][c] = two.y;
        }
      #pragma unroll
      for (int j = 0; j < 8; ++j) across<CHUNKS>(w[j / 4][j % 4]);
      u16* to = out + place(start + col, first + token, held, cols / 64);
      const size_t step = place(256, 0, held, cols / 64);
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c, to += step) {
        u32 four[4];
        #pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = pack16(w[0][j][c] * norm(), w[1][j][c] * norm());
        *(uint4*)to = make_uint4(four[0], four[1], four[2], four[3]);
      }
    }
    __syncthreads();
  }
}
