// Sylvester-Hadamard transforms of 256 columns a warp, of which lane l has those from 8l on, and of several such chunks.

// Eight columns, those whose bit of `negative` is set with the other sign.
__device__ __forceinline__ void unpack_signed(float* v, uint4 raw, u32 negative) {
  const u32 w[4] = {raw.x, raw.y, raw.z, raw.w};
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float f = from16((u16)(w[i / 2] >> 16 * (i % 2)));
    v[i] = negative >> i & 1 ? -f : f;
  }
}
// Of what a lane has alone. Not normalized.
template <int COUNT> __device__ __forceinline__ void hadamard(float* v) {
  #pragma unroll
  for (int h = 1; h < COUNT; h *= 2)
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) if (!(i & h)) { const float a = v[i], b = v[i | h]; v[i] = a + b; v[i | h] = a - b; }
}
// Not normalized.
__device__ __forceinline__ void hadamard256(float* v, int lane) {
  hadamard<8>(v);
  #pragma unroll
  for (int h = 1; h < 32; h *= 2) {
    const float sign = lane & h ? -1 : 1;
    #pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __shfl_xor_sync(~0u, v[i], h) + sign * v[i];
  }
}
// A chunk for who has the others of its block, in the order of its columns.
__device__ __forceinline__ void leave(const float* v, float* scratch, int lane) {
  *(float4*)(scratch + 8 * lane) = make_float4(v[0], v[1], v[2], v[3]);
  *(float4*)(scratch + 8 * lane + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
// The orthonormal discrete Hartley transform: cas(2π k / M) / √M, of which glq.rotation has the matrix [i][j] at k = i · j mod M.
template <int M> struct Hartley {
  float at[M] = {};
  constexpr Hartley() {
    double root = M;
    for (int i = 0; i < 30; ++i) root = (root + M / root) / 2;
    for (int k = 0; k < M; ++k) {
      const double angle = 2 * 3.14159265358979323846 * (2 * k > M ? k - M : k) / M;
      double term = 1, sum = 0;  // of the series of cos + sin
      for (int n = 0; n < 40; term *= angle / ++n) sum += n / 2 % 2 ? -term : term;
      at[k] = (float)(sum / root);
    }
  }
};
static constexpr int odd_part(int n) { return n % 2 ? n : odd_part(n / 2); }
// One column of COUNT chunks, transformed across them; times the square root of the power of two in COUNT.
template <int COUNT> __device__ __forceinline__ void across(float* v) {
  constexpr int ODD = odd_part(COUNT), POW = COUNT / ODD;
  #pragma unroll
  for (int h = 1; h < POW; h *= 2)
    #pragma unroll
    for (int c = 0; c < COUNT; ++c) if (c % POW / h % 2 == 0) { const float a = v[c], b = v[c + h]; v[c] = a + b; v[c + h] = a - b; }
  if (ODD == 1) return;
  constexpr Hartley<ODD> hartley;
  #pragma unroll
  for (int p = 0; p < POW; ++p) {
    float w[ODD];
    #pragma unroll
    for (int i = 0; i < ODD; ++i) w[i] = v[i * POW + p];
    #pragma unroll
    for (int i = 0; i < ODD; ++i) {
      float sum = 0;
      #pragma unroll
      for (int j = 0; j < ODD; ++j) sum += hartley.at[i * j % ODD] * w[j];
      v[i * POW + p] = sum;
    }
  }
}
// What a chunk of the result has of each.
template <int COUNT> __device__ __forceinline__ void row_across(float* row, int chunk) {
  constexpr int ODD = odd_part(COUNT), POW = COUNT / ODD;
  constexpr Hartley<ODD> hartley;
  #pragma unroll
  for (int c = 0; c < COUNT; ++c) {
    const float factor = ODD == 1 ? 1 : hartley.at[chunk / POW * (c / POW) % ODD];
    row[c] = __popc(chunk & c % POW) % 2 ? -factor : factor;
  }
}
template <int COUNT> __device__ __forceinline__ void gather(float* v, const float* scratch) {
  #pragma unroll
  for (int c = 0; c < COUNT; ++c) v[c] = scratch[256 * c];
  across<COUNT>(v);
}
