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

// Eight columns of a token, the first of which is a multiple of eight. Not in FRAGMENTS.
__device__ __forceinline__ void put_eight(u16* out, int col, int token, int held, int tiles, const u32* pairs) {
  u16* const to = out + place(col, token, held, tiles);
  if (LAYOUT == SWIZZLED) {
    *(uint2*)to = make_uint2(pairs[0], pairs[1]);
    *(uint2*)(out + place(col + 4, token, held, tiles)) = make_uint2(pairs[2], pairs[3]);
  } else {
    *(uint4*)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
// In FRAGMENTS four lanes, APART from each other, have eight columns each, 16 from one to the next: their t-th pairs make a chunk. They are transposed,
// and the t-th lane puts the t-th of the chunks. half: of the first 16 columns, which eight.
template <int APART> __device__ __forceinline__ void put_chunk(u16* out, int tile, int token, int held, int half, bool is, u32* pairs) {
  const int lane = threadIdx.x % 32, t = lane / APART % 4;
  #pragma unroll
  for (int d = 1; d < 4; d *= 2)
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const u32 got = __shfl_sync(~0u, t & d ? pairs[i] : pairs[i + d], lane ^ APART * d);
      if (t & d) pairs[i] = got;
      else pairs[i + d] = got;
    }
  if (is) *(uint4*)(out + ((size_t)tile * held + token) * 64 + (half * 4 + t ^ token % 8) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
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
  put_chunk<2>(out, col / 64, token, held, lane % 2, true, pairs);
#else
  *(uint4*)(out + place(col, token, held, cols / 64)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
}

// The same for many tokens, eight at once. Tensor cores transform along four bits of a column's number, which lie within 16 bytes of
// four lanes: x as it is in memory is an operand. Along the others a lane has all values: first of the 256 columns of a warp,
// then, through shared memory, of all CHUNKS. A lane's column of a token, by bits from the lowest: 0, 3 and 4 are those of the lane's
// group of four, 1 that of the register, 2 that of one of two products, 5 to 7 that of one of eight times 16 bytes.
static constexpr int TOGETHER = 8;           // tokens
static constexpr int EIGHTHS = 64, SLOTS = EIGHTHS * TOGETHER;  // of a chunk: four columns of a token, of the same bits but 1 and 2

// Where in a chunk four columns of a token lie: lanes that read or write at once differ in token or in its lowest bit, so in banks.
__device__ __forceinline__ int slot_of(int four, int token) { return four * TOGETHER + (token ^ four % 2); }

// GATHER: token i is row pairs[i] / each of x, or none (−1), up to blocks[0] times `tokens`.
extern "C" __global__ void __launch_bounds__(32 * CHUNKS, 16 / CHUNKS)
rotate_many(const u16* x, const u8* signs, u16* out, const int* blocks, const int* pairs, int each, int held, int cols, int tokens) {
  extern __shared__ __align__(128) float4 fours[];  // [CHUNKS][SLOTS], then which of two columns change their sign, [WIDTH / 2]
  let_next_start();
  u32* const negative = (u32*)(fours + CHUNKS * SLOTS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, start = blockIdx.y * WIDTH;
  for (int i = threadIdx.x; i < WIDTH / 2; i += 32 * CHUNKS) {
    const u32 bits = signs[(start + 2 * i) / 8] >> (2 * i % 8);
    negative[i] = (bits & 1) << 15 | (bits & 2) << 30;
  }
  u32 hadamard16[4];
  sylvester16(hadamard16, lane, ONES);
  uint4 raw[8];
  auto request = [&](int first) {
    int row = first + g < tokens ? first + g : -1;
    if (GATHER && row >= 0) row = pairs[row] < 0 ? -1 : pairs[row] / each;
    const uint4* const from = (const uint4*)(x + (size_t)row * cols + start + 256 * warp + 8 * t);
    #pragma unroll
    for (int q = 0; q < 8; ++q) raw[q] = row >= 0 ? from[4 * q] : make_uint4(0, 0, 0, 0);
  };
  wait_for_previous();
  if (GATHER) tokens *= blocks[0];
  request(blockIdx.x * TOGETHER);
  __syncthreads();
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
    #pragma unroll
    for (int q = 0; q < 8; ++q)
      #pragma unroll
      for (int e = 0; e < 2; ++e)
        fours[warp * SLOTS + slot_of(8 * q + g, 2 * t + e)] = make_float4(v[e][2 * q], v[2 + e][2 * q], v[e][2 * q + 1], v[2 + e][2 * q + 1]);
    __syncthreads();
    #pragma unroll 1
    for (int i = threadIdx.x; i < 256; i += 32 * CHUNKS) {
      const int token = i % TOGETHER, eight = LAYOUT == FRAGMENTS ? i / 64 * 8 + i / 32 % 2 + i / 8 % 4 * 2 : i / TOGETHER;  // columns
      const bool is = first + token < tokens && !(GATHER && pairs[first + token] < 0);
      if (LAYOUT != FRAGMENTS && !is) continue;
      float w[2][4][CHUNKS];
      #pragma unroll
      for (int e = 0; e < 2; ++e) {
        #pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
          const float4 four = fours[c * SLOTS + slot_of(2 * eight + e, token)];
          w[e][0][c] = four.x, w[e][1][c] = four.y, w[e][2][c] = four.z, w[e][3][c] = four.w;
        }
        #pragma unroll
        for (int j = 0; j < 4; ++j) across<CHUNKS>(w[e][j]);
      }
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        u32 two[4];
        #pragma unroll
        for (int j = 0; j < 4; ++j) two[j] = pack16(w[0][j][c] * norm(), w[1][j][c] * norm());
        const int col = start + 256 * c + 8 * eight;
        if (LAYOUT == FRAGMENTS) put_chunk<8>(out, col / 64, first + token, held, eight % 2, is, two);
        else put_eight(out, col, first + token, held, cols / 64, two);
      }
    }
    __syncthreads();
  }
}
