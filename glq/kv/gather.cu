// Tokens of a paged E8 cache (glq/kv/layout.py) as vectors: a warp takes two tokens of one head at a time, whose words it decodes
// together, a lane each, and rotates them back in shared memory.
// Macros, besides BF16 (the type of keys and values): DIM, KEY_BITS, VALUE_BITS, PAGE_TOKENS, WARPS.

static constexpr int WORDS = DIM / 8;
static constexpr float LARGEST = BF16 ? 3.3895314e38f : 65504;

template <int BITS> __device__ __forceinline__ u32 load_word(const u8* p) {
  if (BITS == 4) return *(const u32*)p;
  return BITS == 2 ? *(const u16*)p : p[0] | (u32)p[1] << 8 | (u32)p[2] << 16;
}

// words: of the two tokens, one row after the other; scales: of both; factors [DIM]: what vectors are divided by, null for none; to: where the first one's vector goes, that of the second, if
// there is one, a `step` further on.
template <int BITS> __device__ void gather_two(const u8* words, u32 scales, const float* factors, u16* to, size_t step, bool second, float* x, const Tables& tables, int lane) {
  if (lane < WORDS) {
    u32 v[8];
    decode2<BITS>(v, load_word<BITS>(words + BITS * lane), load_word<BITS>(words + BITS * (WORDS + lane)), tables);
    const float a = from_half((u16)scales), b = from_half((u16)(scales >> 16));
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[8 * lane + i] = from_half((u16)v[i]) * a;
      x[DIM + 8 * lane + i] = from_half((u16)(v[i] >> 16)) * b;
    }
  }
  __syncwarp();
  for (int token = 0; token < 1 + second; ++token) {
    float* const y = x + token * DIM;
    mix(y, lane);
    for (int i = 2 * lane; i < DIM; i += 64) {
      auto kept = [](float v) { return v > LARGEST ? LARGEST : v < -LARGEST ? -LARGEST : v; };  // NaN, too
      const float a = factors ? reciprocal(factors[i]) : 1, b = factors ? reciprocal(factors[i + 1]) : 1;
      *(u32*)(to + token * step + i) = pack16(kept(y[i] * a), kept(y[i + 1] * b));
    }
  }
  __syncwarp();
}

// keys, values [tokens][kv_heads][DIM]. A grid of any size.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
gather_tokens(const u8* pages, const int* page_table, const uint4* from, const float* factors, u16* keys, u16* values, int kv_heads, int page_bytes, int tokens) {
  extern __shared__ __align__(16) u8 memory[];
  for (int i = threadIdx.x; i < (int)sizeof(Tables) / 16; i += 32 * WARPS) ((uint4*)memory)[i] = from[i];
  const Tables& tables = *(const Tables*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = kv_heads * PAGE_TOKENS;
  float* const x = (float*)(memory + sizeof(Tables)) + warp * 2 * DIM;
  const int units = (tokens + 1) / 2 * kv_heads;  // of keys, and as many of values
  __syncthreads();
  let_next_start();
  wait_for_previous();
  for (int unit = blockIdx.x * WARPS + warp; unit < 2 * units; unit += gridDim.x * WARPS) {
    const bool is_value = unit >= units;
    const int of_kind = unit - is_value * units, head = of_kind % kv_heads, token = of_kind / kv_heads * 2;
    const int place = head * PAGE_TOKENS + token % PAGE_TOKENS;
    const u8* const part = pages + (size_t)page_table[token / PAGE_TOKENS] * page_bytes + (is_value ? rows * (WORDS * KEY_BITS + 2) : 0);
    const int row_bytes = WORDS * (is_value ? VALUE_BITS : KEY_BITS);
    const u8* const words = part + place * row_bytes;
    const u32 scales = *(const u32*)(part + rows * row_bytes + 2 * place);
    u16* const to = (is_value ? values : keys) + ((size_t)token * kv_heads + head) * DIM;
    const size_t step = (size_t)kv_heads * DIM;
    if (is_value) gather_two<VALUE_BITS>(words, scales, nullptr, to, step, token + 1 < tokens, x, tables, lane);
    else gather_two<KEY_BITS>(words, scales, factors, to, step, token + 1 < tokens, x, tables, lane);
  }
}
