// The rotation of x, in a launch of its own, and the order in which the kernels want it.
// Macros, besides those of ptx.cuh: CHUNKS (of 256 columns in a block of the rotation, for rotate_chunks); LAYOUT: TILES of
// 64 columns for decode.cu, in rows of 72, of which the last 8 keep banks apart; WGMMA, in rows of 64, ordered and swizzled
// for prefill.cu; ROWS, x as it was.

static constexpr int TILES = 0, WGMMA = 1;

// Where a column of a token lies.
__device__ __forceinline__ size_t place(int col, int token, int held, int tiles) {
  if (LAYOUT == TILES) return ((size_t)(col / 64) * held + token) * 72 + col % 64;
  if (LAYOUT != WGMMA) return (size_t)token * tiles * 64 + col;
  const int c = col % 64, at = c / 32 * 32 + c / 4 % 4 * 8 + c / 16 % 2 * 4 + c % 4;  // as place_of_step has them
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

// The same where width is 256 · CHUNKS, a power of two: one warp for 256 columns.
extern "C" __global__ void __launch_bounds__(32 * CHUNKS)
rotate_chunks(const u16* x, const u8* signs, u16* out, int held, int cols) {
  __shared__ __align__(16) float values[256 * CHUNKS];
  let_next_start();
  const int token = blockIdx.x, start = blockIdx.y * 256 * CHUNKS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = start + 256 * warp + 8 * lane;
  float v[8];
  wait_for_previous();
  load_signed(v, x + (size_t)token * cols, signs, col);
  hadamard256(v, lane);
  if (CHUNKS > 1) {
    leave(v, values + 256 * warp, lane);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += 32 * CHUNKS) {
      float w[CHUNKS];
      gather<CHUNKS>(w, values + i);
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c) values[256 * c + i] = w[c];
    }
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = values[256 * warp + 8 * lane + i];
  }
  u32 pairs[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = (u32)to16(v[2 * i] * rsqrtf(256.0f * CHUNKS)) | (u32)to16(v[2 * i + 1] * rsqrtf(256.0f * CHUNKS)) << 16;
#if LAYOUT == 1
  const bool late = lane / 2 % 2;  // lanes with the first and the second half of chunks change pairs, and write 16 bytes
  const u32 first = __shfl_sync(~0u, late ? pairs[0] : pairs[2], lane ^ 2), second = __shfl_sync(~0u, late ? pairs[1] : pairs[3], lane ^ 2);
  const int chunk = lane % 8 / 4 * 4 + lane % 2 * 2 + late;
  u16* const to = out + ((size_t)(col / 64) * held + token) * 64 + (chunk ^ token % 8) * 8;
  *(uint4*)to = late ? make_uint4(first, second, pairs[2], pairs[3]) : make_uint4(pairs[0], pairs[1], first, second);
#else
  *(uint4*)(out + place(col, token, held, cols / 64)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
}
