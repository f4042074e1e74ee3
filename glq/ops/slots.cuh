// What blocks hand each other of a tile of sums: as warpgroups have them, 64 rows each (prefill.cu, prompt.cu).
// Macro TOKENS: of a tile.

// Where a thread's sums lie in what blocks hand over: all have the same ones of a tile.
__device__ __forceinline__ int place_in_slot() { return threadIdx.x / 128 * 64 * TOKENS + threadIdx.x % 128 * 4; }
// Fragments FROM … FROM + COUNT − 1.
template <int FROM, int COUNT> __device__ __forceinline__ void hand_over_some(const float* acc, float* slot) {
  #pragma unroll
  for (int i = FROM; i < FROM + COUNT; ++i) hand_over(slot + place_in_slot() + 512 * i, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
}
