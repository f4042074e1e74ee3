// What the x of a product is made of, in kernels that rotate it.
// Macro INPUT: PLAIN, x itself; SILU, silu(x) · other; NORM, weight · s / √(mean(s²) + eps) of s = x + other, which goes to `total`.

static constexpr int PLAIN = 0, SILU = 1, NORM = 2;

struct Input {
  const u16 *x, *other, *weight;  // of a token
  u16* total;
  float eps;

  __device__ Input(const u16* x, const u16* other, const u16* weight, u16* total, int eps, int stride, int token, int cols)
      : x(x + (size_t)token * stride), other(other + (size_t)token * stride), weight(weight), total(total + (size_t)token * cols), eps(__int_as_float(eps)) {}
};

// Eight columns of a token on their way: their signs and weights do not depend on the kernel ahead.
struct Eight {
  uint4 x, other, weight;
  u32 negative;

  __device__ __forceinline__ void request_constants(const Input& input, const u8* signs, int col) {
    negative = signs[col / 8];
    request_weight(input, col);
  }
  __device__ __forceinline__ void request_weight(const Input& input, int col) {
    if (INPUT == NORM) weight = *(const uint4*)(input.weight + col);
  }
  __device__ __forceinline__ void request(const Input& input, int col) {
    x = *(const uint4*)(input.x + col);
    if (INPUT != PLAIN) other = *(const uint4*)(input.other + col);
  }
  // What is to be rotated, of PLAIN, in pairs.
  __device__ __forceinline__ void take_signed(u32* pairs) const {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
    #pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = words[i] ^ (negative >> 2 * i & 1) << 15 ^ (negative >> 2 * i & 2) << 30;
  }
  // The same of any kind; of NORM before it is divided.
  __device__ __forceinline__ void take(float* v) const {
    unpack_signed(v, x, negative);
    if (INPUT == SILU) {
      float gate[8];
      unpack_signed(gate, x, 0);
      unpack_signed(v, other, negative);
      #pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= silu(gate[i]);
    }
    if (INPUT == NORM) {
      float more[8], by[8];
      unpack_signed(more, other, negative);
      unpack_signed(by, weight, 0);
      #pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = from16(to16(v[i] + more[i])) * by[i];
    }
  }
};

// What NORM divides by, from the squares that a warp's lanes have added up of its columns. Of columns from `first` up to `end` the sum is stored.
// By `threads` threads, of which this is the thread-th; every lane has the warp's sum.
__device__ __forceinline__ float sum_squares(const Input& input, int cols, int thread, int threads, int first, int end) {
  float squares = 0;
  #pragma unroll 1
  for (int col = 8 * thread; col < cols; col += 8 * threads) {
    float v[8], more[8];
    unpack_signed(v, *(const uint4*)(input.x + col), 0);
    unpack_signed(more, *(const uint4*)(input.other + col), 0);
    u16 sums[8];
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[i] = to16(v[i] + more[i]);
      squares += from16(sums[i]) * from16(sums[i]);
    }
    if (first <= col && col < end) {
      uint4 out;
      u32* const words = (u32*)&out;
      #pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = sums[2 * i] | (u32)sums[2 * i + 1] << 16;
      *(uint4*)(input.total + col) = out;
    }
  }
  #pragma unroll
  for (int h = 1; h < 32; h *= 2) squares += __shfl_xor_sync(~0u, squares, h);
  return squares;
}
template <int COUNT> __device__ __forceinline__ float inverse_norm(const float* squares, int cols, float eps) {
  float sum = 0;
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) sum += squares[i];
  return rsqrtf(sum / cols + eps);
}
