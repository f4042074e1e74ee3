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

// ---- by tensor cores ----

static constexpr u32 ONES_BF16 = 0x3F803F80, ONES = BF16 ? ONES_BF16 : 0x3C003C00;
// A fragment of the Sylvester matrix of 16: register i has row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next. As an operand on the right, registers j and j + 2
// have columns g + 8j. ones: two of them, in the operands' type.
__device__ __forceinline__ void sylvester16(u32* a, int lane, u32 ones) {
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
    a[i] = ones | (u32)(__popc(row & k) & 1) << 15 | (u32)(__popc(row & (k + 1)) & 1) << 31;
  }
}
// Two numbers as bf16 and what is left of them as bf16: 16 bits of each.
__device__ __forceinline__ void split(float a, float b, u32& high, u32& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xFFFF0000u));
}
// 256 columns, of which a lane has four pairs from column 8 · lane on, in two parts as split gives them, EXACT if there is no second one. A product transforms along bits 0, 1, 3
// and 4 of a column's number, and the next, of its sums, along the others. sums[j][2b + e]: of the column whose bits 1, 2 and 5 are b, j and e, and bits 0, 3, 4 and
// 6, 7 those of lane / 4 and of lane % 4. Not normalized.
template <bool EXACT> __device__ __forceinline__ void hadamard256(float (*sums)[4], const u32* high, const u32* low, const u32* sylvester) {
  float first[2][4] = {};
  u32 parts[2][4];
  #pragma unroll
  for (int h = 0; h < 2; ++h) {
    mma_bf16(first[h], sylvester, high[2 * h], high[2 * h + 1]);
    if (!EXACT) mma_bf16(first[h], sylvester, low[2 * h], low[2 * h + 1]);
    #pragma unroll
    for (int i = 0; i < 2; ++i) split(first[h][2 * i], first[h][2 * i + 1], parts[0][2 * h + i], parts[1][2 * h + i]);
  }
  #pragma unroll
  for (int j = 0; j < 2; ++j) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0;
    #pragma unroll
    for (int p = 0; p < 2; ++p) mma_bf16(sums[j], parts[p], sylvester[j], sylvester[j + 2]);
  }
}

// ---- across chunks ----

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
