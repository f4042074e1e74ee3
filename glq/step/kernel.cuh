// What the kernels that are written for a step share (kernel.py). Macro: THREADS, of a block.

__device__ __forceinline__ float round16(float v) { return from16(to16(v)); }

// The sum over all threads of a block, for each of them.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float sums[THREADS / 32];
  #pragma unroll
  for (int m = 16; m > 0; m /= 2) v += __shfl_xor_sync(~0u, v, m);
  __syncthreads();  // all have read the sums before
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  #pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) v += sums[w];
  return v;
}
