// M·x of glq/kv/codec.py, M = H·D·H: of a head vector in shared memory, by one warp.
// Macro: DIM.

// H, up to a factor √P.
__device__ __forceinline__ void transform(float* x, int lane) {
  constexpr int M = odd_part(DIM), P = DIM / M;
  #pragma unroll
  for (int h = 1; h < P; h *= 2) {
    for (int k = lane; k < DIM / 2; k += 32) {
      const int i = k / h * 2 * h + k % h;
      const float a = x[i], b = x[i + h];
      x[i] = a + b;
      x[i + h] = a - b;
    }
    __syncwarp();
  }
  if (M == 1) return;
  for (int i = lane; i < P; i += 32) {
    float v[M];
    #pragma unroll
    for (int j = 0; j < M; ++j) v[j] = x[j * P + i];
    across<M>(v);
    #pragma unroll
    for (int j = 0; j < M; ++j) x[j * P + i] = v[j];
  }
  __syncwarp();
}
__device__ __forceinline__ void mix(float* x, int lane) {
  transform(x, lane);
  for (int i = lane; i < DIM; i += 32) {
    u32 h = (u32)(i + 1) * 0x9E3779B1u;
    h = (h ^ h >> 15) * 0x85EBCA77u;
    x[i] *= (h >> 31 ? -1.0f : 1.0f) / (DIM / odd_part(DIM));
  }
  __syncwarp();
  transform(x, lane);
}
