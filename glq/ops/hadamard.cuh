// Sylvester-Hadamard transforms of 256 columns a warp, of which lane l has those from 8l on, and of several such chunks.

__device__ __forceinline__ void load_signed(float* v, const u16* x, const u8* signs, int col) {
  const uint4 raw = *(const uint4*)(x + col);
  const u32 sign = signs[col / 8], w[4] = {raw.x, raw.y, raw.z, raw.w};
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float f = from16((u16)(w[i / 2] >> 16 * (i % 2)));
    v[i] = sign >> i & 1 ? -f : f;
  }
}
// Not normalized.
__device__ __forceinline__ void hadamard256(float* v, int lane) {
  #pragma unroll
  for (int h = 1; h < 8; h *= 2)
    #pragma unroll
    for (int i = 0; i < 8; ++i) if (!(i & h)) { const float a = v[i], b = v[i | h]; v[i] = a + b; v[i | h] = a - b; }
  #pragma unroll
  for (int h = 1; h < 32; h *= 2)
    #pragma unroll
    for (int i = 0; i < 8; ++i) { const float o = __shfl_xor_sync(~0u, v[i], h); v[i] = lane & h ? o - v[i] : o + v[i]; }
}
// A chunk for who has the others of its block, in the order of its columns.
__device__ __forceinline__ void leave(const float* v, float* scratch, int lane) {
  *(float4*)(scratch + 8 * lane) = make_float4(v[0], v[1], v[2], v[3]);
  *(float4*)(scratch + 8 * lane + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
// One column of COUNT chunks, transformed across them.
template <int COUNT> __device__ __forceinline__ void gather(float* v, const float* scratch) {
  #pragma unroll
  for (int c = 0; c < COUNT; ++c) v[c] = scratch[256 * c];
  #pragma unroll
  for (int h = 1; h < COUNT; h *= 2)
    #pragma unroll
    for (int c = 0; c < COUNT; ++c) if (!(c & h)) { const float a = v[c], b = v[c | h]; v[c] = a + b; v[c | h] = a - b; }
}
