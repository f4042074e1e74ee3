// How blocks hand each other sums: through memory that is full of EMPTY before and after (nvrtc.Launcher.exchange), without
// counters or fences. Who takes waits: for blocks before it, which the GPU started earlier; in batch.cu, which says why it may, for others, too.

static constexpr u32 EMPTY = ~0u;  // not there yet: a NaN that no instruction makes

__device__ __forceinline__ void hand_over(float* to, float4 v) {
  const u32 words[4] = {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
  store_shared_by_gpu(to, min(words[0], EMPTY - 1), min(words[1], EMPTY - 1), min(words[2], EMPTY - 1), min(words[3], EMPTY - 1));
}
__device__ __forceinline__ bool is_there(uint4 v) { return v.x != EMPTY & v.y != EMPTY & v.z != EMPTY & v.w != EMPTY; }
// COUNT of them at once, `apart` floats from one to the next.
template <int COUNT> __device__ __forceinline__ void take_over(float4 (&v)[COUNT], float* from, int apart) {
  uint4 words[COUNT];
  bool there;
  do {
    there = true;
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) words[i] = load_shared_by_gpu(from + i * apart);
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) there &= is_there(words[i]);
  } while (!there);
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    store_shared_by_gpu(from + i * apart, EMPTY, EMPTY, EMPTY, EMPTY);
    v[i] = make_float4(__uint_as_float(words[i].x), __uint_as_float(words[i].y), __uint_as_float(words[i].z), __uint_as_float(words[i].w));
  }
}
__device__ __forceinline__ void add(float4& a, float4 b) { a.x += b.x; a.y += b.y; a.z += b.z; a.w += b.w; }
// sum += what `count` blocks hand over, `apart` floats from one to the next, in this order.
__device__ __forceinline__ void add_parts(float4& sum, float* from, int apart, int count) {
  constexpr int AT_ONCE = __CUDA_ARCH__ == 900 ? 4 : 2;  // elsewhere the assembler runs out of registers
  #pragma unroll 1
  for (; count > 0; count -= AT_ONCE, from += AT_ONCE * apart) {
    uint4 words[AT_ONCE];
    bool there;
    do {
      there = true;
      #pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) if (i < count) words[i] = load_shared_by_gpu(from + i * apart);
      #pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) there &= i >= count || is_there(words[i]);
    } while (!there);
    #pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i >= count) break;
      store_shared_by_gpu(from + i * apart, EMPTY, EMPTY, EMPTY, EMPTY);
      add(sum, make_float4(__uint_as_float(words[i].x), __uint_as_float(words[i].y), __uint_as_float(words[i].z), __uint_as_float(words[i].w)));
    }
  }
}
