// The rotation of x, in a launch of its own, and the order in which the kernels want it.
// Macros, besides those of input.cuh: CHUNKS (of 256 columns in a block of the rotation, for rotate_chunks); LAYOUT: TILES of
// 64 columns for decode.cu, in rows of 72, of which the last 8 keep banks apart; SWIZZLED and FRAGMENTS, in rows of 64, ordered and
// swizzled for prefill.cu and batch.cu; ROWS, x as it was.

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
#if INPUT == 2
  __shared__ float squares[CHUNKS];
#endif
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
  const float sum = sum_squares(input, cols, 32 * CHUNKS, blockIdx.y * WIDTH, (blockIdx.y + 1) * WIDTH);
  if (lane == 0) squares[warp] = sum;
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
#if INPUT == 2
  __syncwarp();  // a block of one warp has had no other barrier
  by *= inverse_norm<CHUNKS>(squares, cols, input.eps);
#endif
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
  const int t = lane / 2 % 4;  // of four lanes, whose t-th pairs make a chunk: they are transposed
  #pragma unroll
  for (int d = 1; d < 4; d *= 2)
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const u32 got = __shfl_sync(~0u, t & d ? pairs[i] : pairs[i + d], lane ^ 2 * d);
      if (t & d) pairs[i] = got;
      else pairs[i + d] = got;
    }
  *(uint4*)(out + ((size_t)(col / 64) * held + token) * 64 + (lane % 2 * 4 + t ^ token % 8) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#else
  *(uint4*)(out + place(col, token, held, cols / 64)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
}

// The same for many tokens: three passes through shared memory, with 16 columns a thread. Blocks of threads take AT_ONCE tokens
// after the other, whose x comes while those before are transformed. 2 · AT_ONCE · WIDTH floats of shared memory.
static constexpr int LANES = 16 * CHUNKS, AT_ONCE = 128 / LANES;

// Where a column lies in shared memory, so that in no pass two lanes want the same bank.
__device__ __forceinline__ int swizzled(int col) {
  const int q = col / 16, at = q ^ (q / 16 & 1);
  return at * 16 + ((col / 4 ^ q / 2) & 3) * 4 + col % 4;
}

extern "C" __global__ void __launch_bounds__(128, 6)
rotate_many(const u16* x, const u8* signs, u16* out, int held, int cols, int tokens) {
  extern __shared__ __align__(128) float values[];
  let_next_start();
  const int slot = threadIdx.x / LANES, lane = threadIdx.x % LANES, start = blockIdx.y * WIDTH, step = gridDim.x * AT_ONCE;
  const u32 negative = *(const u16*)(signs + (start + 16 * lane) / 8);
  uint4 raw[2] = {};
  auto request = [&](int token) {
    if (slot >= AT_ONCE || token >= tokens) return;
    const uint4* const from = (const uint4*)(x + (size_t)token * cols + start + 16 * lane);
    raw[0] = from[0], raw[1] = from[1];
  };
  wait_for_previous();
  request(blockIdx.x * AT_ONCE + slot);
  #pragma unroll 1
  for (int first = blockIdx.x * AT_ONCE, turn = 0; first < tokens; first += step, turn ^= 1) {
    float* const now = values + turn * AT_ONCE * WIDTH, * const mine = now + slot * WIDTH;
    float v[16];
    if (slot < AT_ONCE) {
      unpack_signed(v, raw[0], negative);
      unpack_signed(v + 8, raw[1], negative >> 8);
      request(first + step + slot);
      hadamard<16>(v);
      #pragma unroll
      for (int i = 0; i < 16; i += 4) *(float4*)(mine + swizzled(16 * lane + i)) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
    __syncthreads();
    if (slot < AT_ONCE) {
      const int col = lane / 16 * 256 + lane % 16;
      #pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = mine[swizzled(col + 16 * i)];
      hadamard<16>(v);
      #pragma unroll
      for (int i = 0; i < 16; ++i) mine[swizzled(col + 16 * i)] = v[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 128 * AT_ONCE; i += 128) {  // a thread has the same two columns of all chunks
      const int token = first + i / 128, col = 2 * (i % 128);
      if (token >= tokens) break;
      float even[CHUNKS], odd[CHUNKS];
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const float2 two = *(const float2*)(now + i / 128 * WIDTH + swizzled(256 * c + col));
        even[c] = two.x, odd[c] = two.y;
      }
      across<CHUNKS>(even);
      across<CHUNKS>(odd);
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        *(u32*)(out + place(start + 256 * c + col, token, held, cols / 64)) = pack16(even[c] * norm(), odd[c] * norm());
    }
  }
}
