// The rotation of x, in a launch of its own.
// Macros, besides those of rotation.cuh: GATHER (0 or 1), whether rotate_many takes rows of x in another order.

// x [tokens, cols] → rotated, filled up to whole tiles of 64 columns; blocks of odd · pow columns, hartley [odd][padded] fp32: the orthonormal one, whose rows are
// filled up to 16 bytes. One block of threads a token and block of columns; width floats of shared memory.
extern "C" __global__ void __launch_bounds__(512)
rotate_tiles(const u16* x, const u8* signs, const u32* hartley, u16* out, int held, int cols, int width, int odd) {
  extern __shared__ __align__(128) float values[];
  let_next_start();
  const int token = blockIdx.x, start = blockIdx.y * width, pow = width / odd, padded = (odd + 3) / 4 * 4, tiles = (cols + 63) / 64;
  u32 early;
  for (int i = 32 * threadIdx.x; i < odd * padded; i += 32 * blockDim.x) load_now(early, hartley + i);  // into the L1 cache
  wait_for_previous();
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const int col = start + i;
    const float f = from16(x[(size_t)token * cols + col]);
    values[i] = signs[col / 8] >> (col % 8) & 1 ? -f : f;
  }
  __syncthreads();
  for (int h = 1; h < pow; h *= 2) {  // pairs of one step are a thread's own
    for (int i = threadIdx.x; i < width / 2; i += blockDim.x) {
      const int lo = i / h * 2 * h + i % h;
      const float a = values[lo], b = values[lo + h];
      values[lo] = a + b;
      values[lo + h] = a - b;
    }
    __syncthreads();
  }
  const float norm = rsqrtf((float)pow);
  for (int i = threadIdx.x; i < padded / 4 * pow; i += blockDim.x) {  // four rows of a column
    const int row = i / pow * 4, place_in_row = i % pow;
    const float* from = values + place_in_row;
    const u32* by = hartley + row;  // it is symmetric
    float sums[4] = {};
    #pragma unroll 4
    for (int a = 0; a < odd; ++a, from += pow, by += padded) {
      const uint4 four = *(const uint4*)by;
      const float v = *from;
      sums[0] += __uint_as_float(four.x) * v, sums[1] += __uint_as_float(four.y) * v;
      sums[2] += __uint_as_float(four.z) * v, sums[3] += __uint_as_float(four.w) * v;
    }
    #pragma unroll
    for (int k = 0; k < 4; ++k)
      if (row + k < odd) out[place(start + (row + k) * pow + place_in_row, token, held, tiles)] = to16(sums[k] * norm);
  }
  if (start + width == cols)  // columns that fill up the last tile
    for (int col = cols + threadIdx.x; col < 64 * tiles; col += blockDim.x) out[place(col, token, held, tiles)] = 0;
}

static constexpr int WARPS = 4;
static constexpr bool HOPPER = __CUDA_ARCH__ == 900;
// Blocks of threads, as many as there are registers for.
static constexpr int TOGETHER = CHUNKS > 5 ? 3 : CHUNKS > 3 ? 4 : CHUNKS > 1 ? 5 : 10;

// The same where width is 256 · CHUNKS: a warp has one token at a time (rotation.cuh). Rows of x, or of x and other in SILU, lie `stride` apart.
// GATHER: token i is row pairs[i] / each of x, or none (−1), up to blocks[0] times `tokens`.
// beside: it runs beside the product ahead, which let it start when it had an x of its own, so all of x was complete. Its last block waits for that product, too: who
// waits for this may rely on both.
extern "C" __global__ void __launch_bounds__(32 * WARPS, TOGETHER)
rotate_many(const u16* x, const u16* other, const u8* signs, u16* out, const int* blocks, const int* pairs, int each, int stride, int held, int cols, int tokens, int beside) {
  let_next_start();
  const int start = blockIdx.y * WIDTH, step = gridDim.x * WARPS;
  TokenRotation own(threadIdx.x % 32);
  own.take_signs(signs + start / 8);
  if (HOPPER && beside) see_what_is_complete();
  else wait_for_previous();
  if (GATHER) tokens *= blocks[0];
  auto advance = [&](int token) {  // to the next one that there is
    do token += step;
    while (GATHER && token < tokens && pairs[token] < 0);
    return token;
  };
  auto at = [&](int token) { return Row{x + (size_t)(GATHER ? pairs[token] / each : token) * stride + start, other - x}; };
  int token = advance(blockIdx.x * WARPS + uniform(threadIdx.x / 32) - step);
  if (token < tokens) own.request(at(token));
  #pragma unroll 1
  while (token < tokens) {
    const int next = advance(token);
    own.rotate(at(token), at(next < tokens ? next : token), out, start, token, held, cols / 64);
    token = next;
  }
  if (HOPPER && beside && blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1) wait_for_previous();
}
