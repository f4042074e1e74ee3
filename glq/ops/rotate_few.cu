// The rotation of few tokens, or of an x that is made on the way, where a block has 256 · CHUNKS columns: one warp for 256 columns of a token.
// Macros: those of input.cuh and rotation.cuh.

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

// With 2 KB of shared memory and few registers, so that it starts where the product ahead of it leaves a little room, and is there when that ends.
extern "C" __global__ void __launch_bounds__(32 * CHUNKS)
rotate_few(const u16* x, const u16* other, const u16* weight, u16* total, const u8* signs, u16* out, int eps, int stride, int held, int cols) {
  __shared__ float2 values[CHUNKS][32];
  let_next_start();
  const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, col = blockIdx.y * WIDTH + 256 * warp + 8 * lane;
  float factors[CHUNKS];
  row_across<CHUNKS>(factors, warp);
  const Input input(x, other, weight, total, eps, stride, token, cols);
  Eight own;
  own.request_constants(input, signs, col);
  float v[8], by = rsqrtf((float)(WIDTH / odd_part(CHUNKS)));
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
