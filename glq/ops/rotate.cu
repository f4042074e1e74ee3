// The rotation of x, in a launch of its own, and the order in which the kernels want it.
// Macros, besides those of ptx.cuh: CHUNKS (of 256 columns in a block of the rotation, for rotate_chunks);
// FOR_WGMMA: rows of 64 columns, ordered as the fragments and swizzled, for prefill.cu; else rows of 72, for decode.cu, of
// which the last 8 keep banks apart.

static constexpr int X_STRIDE = FOR_WGMMA ? 64 : 72;

// Where a column of a tile lies in the row of a token.
__device__ __forceinline__ int place(int col, int token) {
#if FOR_WGMMA
  const int at = col / 4 % 4 * 16 + col / 2 % 2 * 8 + col / 16 * 2 + col % 2;
  return at ^ token % 8 * 8;
#else
  return col;
#endif
}

// x [tokens, cols] → rotated, in tiles of 64 columns [column tiles][held][X_STRIDE]; blocks of odd · pow columns, hartley [odd, odd] fp32 orthonormal.
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
    out[((size_t)(col / 64) * held + token) * X_STRIDE + place(col % 64, token)] = to16(from[i] * norm);
  }
  if (start + width == cols)  // columns that fill up the last tile
    for (int col = cols + threadIdx.x; col < 64 * tiles; col += blockDim.x) out[((size_t)(col / 64) * held + token) * X_STRIDE + place(col % 64, token)] = 0;
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
  u16* const row = out + ((size_t)(col / 64) * held + token) * X_STRIDE;
#if FOR_WGMMA
  const int mine = lane / 2 % 4;  // of the chunks to which four lanes have a pair each: so they change pairs, and write 16 bytes
  #pragma unroll
  for (int h = 1; h < 4; h *= 2)
    #pragma unroll
    for (int i = 0; i < 4; ++i) if (!(i & h)) {
      const u32 got = __shfl_sync(~0u, mine & h ? pairs[i] : pairs[i | h], lane ^ 2 * h);
      if (mine & h) pairs[i] = got;
      else pairs[i | h] = got;
    }
  *(uint4*)(row + ((lane % 2 * 4 + mine) ^ token % 8) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#else
  *(uint4*)(row + col % 64) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
#endif
}
