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
// A chunk for the warps that have the others of its block: 256 floats.
__device__ __forceinline__ void leave(const float* v, float* scratch, int lane) {
  #pragma unroll
  for (int i = 0; i < 8; ++i) scratch[32 * i + lane] = v[i];
}
// The transform across `chunks` of them, one after the other in scratch, as far as it is chunk `me`.
__device__ __forceinline__ void gather(float* v, const float* scratch, int chunks, int me, int lane) {
  #pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = 0;
  for (int c = 0; c < chunks; ++c) {
    const bool minus = __popc(c & me) & 1;
    #pragma unroll
    for (int i = 0; i < 8; ++i) { const float o = scratch[256 * c + 32 * i + lane]; v[i] += minus ? -o : o; }
  }
}
__device__ __forceinline__ uint4 pack8(const float* v, float factor) {
  u32 r[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = (u32)to16(v[2 * i] * factor) | (u32)to16(v[2 * i + 1] * factor) << 16;
  return make_uint4(r[0], r[1], r[2], r[3]);
}
