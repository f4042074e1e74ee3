// The rotation where a block has odd · POWER columns: an orthonormal Hartley transform along the first factor of a column's number, in tensor cores, then Sylvester's
// along the second. x is an operand as it is; the Hartley matrix, over √POWER, has two parts in x's type, of 16 or more bits together.
// Macros: those of rotation.cuh, and POWER, from 8 to 128.

static constexpr int WARPS = 8, TILES_OF_8 = POWER / 8;

// x [tokens, cols] → rotated, filled up to whole tiles of 64 columns. hartley: [tiles of 16 rows][tiles of 16 columns][32 lanes][two parts], fragments, filled up with zeros.
// `each` tokens and one block of columns a block of threads; shared memory: each · POWER · (16 column tiles + 8) halves.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
rotate_odd(const u16* x, const u8* signs, const uint4* hartley, u16* out, int held, int cols, int tokens, int odd, int each) {
  extern __shared__ __align__(128) u16 staged[];  // [each][POWER][stride], so that a lane reads two at a time, and no two lanes of the same bank
  let_next_start();
  const int sixteens = (odd + 15) / 16, stride = 16 * sixteens + 8, width = odd * POWER, start = blockIdx.y * width, tiles = (cols + 63) / 64;
  const int first = blockIdx.x * each, count = min(each, tokens - first);
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4;
  for (int i = threadIdx.x; i < each * POWER * stride / 2; i += 32 * WARPS) ((u32*)staged)[i] = 0;
  __syncthreads();
  wait_for_previous();
  for (int token = 0; token < count; ++token)
    for (int i = 2 * threadIdx.x; i < width; i += 64 * WARPS) {
      const u32 negative = signs[(start + i) / 8] >> (start + i) % 8;
      const u32 two = *(const u32*)(x + (size_t)(first + token) * cols + start + i) ^ (negative & 1) << 15 ^ (negative & 2) << 30;
      u16* const to = staged + (token * POWER + i % POWER) * stride + i / POWER;
      to[0] = (u16)two, to[stride] = (u16)(two >> 16);
    }
  __syncthreads();
  #pragma unroll 1
  for (int u = warp; u < count * sixteens; u += WARPS) {
    const int token = u / sixteens, rows = u % sixteens;
    float sums[TILES_OF_8][4] = {};
    #pragma unroll 1
    for (int k = 0; k < sixteens; ++k) {
      const uint4* const at = hartley + ((rows * sixteens + k) * 32 + lane) * 2;
      const uint4 high = at[0], low = at[1];
      const u32 a[2][4] = {{high.x, high.y, high.z, high.w}, {low.x, low.y, low.z, low.w}};
      const u16* const from = staged + (token * POWER + g) * stride + 16 * k + 2 * t;
      #pragma unroll
      for (int n = 0; n < TILES_OF_8; ++n) {
        const u32 b0 = *(const u32*)(from + 8 * n * stride), b1 = *(const u32*)(from + 8 * n * stride + 8);
        mma(sums[n], a[0], b0, b1);
        mma(sums[n], a[1], b0, b1);
      }
    }
    #pragma unroll
    for (int n = 0; n < TILES_OF_8; ++n) {
      hadamard<2>(sums[n]);
      hadamard<2>(sums[n] + 2);
      #pragma unroll
      for (int h = 1; h < 4; h *= 2)
        #pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = __shfl_xor_sync(~0u, sums[n][i], h) + (t & h ? -sums[n][i] : sums[n][i]);
    }
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[TILES_OF_8];
      #pragma unroll
      for (int n = 0; n < TILES_OF_8; ++n) v[n] = sums[n][i];
      hadamard<TILES_OF_8>(v);
      #pragma unroll
      for (int n = 0; n < TILES_OF_8; ++n) sums[n][i] = v[n];
    }
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * rows + 8 * half + g;
      if (row >= odd) continue;
      #pragma unroll
      for (int n = 0; n < TILES_OF_8; ++n)
        *(u32*)(out + place(start + row * POWER + 8 * n + 2 * t, first + token, held, tiles)) = pack16(sums[n][2 * half], sums[n][2 * half + 1]);
    }
  }
  if (start + width < cols) return;
  for (int i = threadIdx.x; i < count * (64 * tiles - cols); i += 32 * WARPS)  // columns that fill up the last tile
    out[place(cols + i % (64 * tiles - cols), first + i / (64 * tiles - cols), held, tiles)] = 0;
}
