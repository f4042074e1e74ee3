// New tokens' keys and values into a paged E8 cache (glq/kv/pages.py): rotated, rounded to words as glq/kv/codec.py does it, stored.
//
// A block has one head vector. At 4 and 3 bits a thread tries one step for one word; at 2 bits a warp looks for a word in the half table.
// Points of the lattice are integers from where they are rounded.
// Macros, besides BF16 (the type of keys and values): DIM, KEY_BITS, VALUE_BITS, PAGE_TOKENS, THREADS.

static constexpr int WORDS = DIM / 8, TRIES = 9;

struct Scratch {
  float x[DIM], error[WORDS][TRIES], products[WORDS], squares[WORDS], divisor;
};
__device__ __forceinline__ u16 finite_half(float v) {
  const u16 h = (u16)pack_half(v, 0);
  return (h & 0x7C00) == 0x7C00 ? 0x7E00 : h;
}

// Twice the point of E8 nearest to t.
__device__ __forceinline__ void nearest(int* y, const float* t) {
  float cost[2], largest[2];
  int parity[2];
  #pragma unroll
  for (int half = 0; half < 2; ++half) {
    float distance = 0, top = 0, total = 0;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float point = rintf(t[i] - 0.5f * half) + 0.5f * half, error = fabsf(t[i] - point);
      distance += error * error;
      top = max(top, error);
      total += point;
    }
    parity[half] = (int)total & 1;
    cost[half] = distance + parity[half] * (1 - 2 * top);
  }
  const bool half = cost[1] < cost[0];
  const float offset = half ? 0.5f : 0;
  int worst = 0;
  float top = -1;
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float size = fabsf(t[i] - (rintf(t[i] - offset) + offset)) + 1e-6f * (8 - i);
    if (size > top) top = size, worst = i;
  }
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float point = rintf(t[i] - offset) + offset;
    const int move = __float_as_uint(t[i] - point) >> 31 ? -2 : 2;
    y[i] = (int)(2 * point) + (i == worst && (half ? parity[1] : parity[0]) ? move : 0);
  }
}

// One step tried for one word; returns the word. values: what it stands for. (glq/kv/shaped.py)
template <int BITS> __device__ __forceinline__ u32 try_step(float* values, const float* x, int attempt) {
  constexpr int Q = 1 << BITS;
  constexpr float STEPS[2][8] = {{151, 179, 207, 237, 268, 306, 358, 480}, {87, 104, 116, 128, 139, 153, 175, 240}};
  constexpr float LARGEST = STEPS[BITS - 3][7] / 512, REACH = LARGEST * ((Q - 2) / 1.4142135623730951);
  const int index = min(attempt, 7);
  float step = LARGEST;
  #pragma unroll
  for (int i = 0; i < 7; ++i) if (index == i) step = STEPS[BITS - 3][i] / 512;
  float t[8], turned[8], energy = 0;
  #pragma unroll
  for (int i = 0; i < 8; ++i) energy += x[i] * x[i];
  const float shrink = attempt == 8 ? min(REACH / max(sqrtf(energy), 1e-30f), 1.0f) : 1;  // inside the region for sure
  #pragma unroll
  for (int i = 0; i < 8; ++i) t[i] = x[i] / step * shrink - (0.5f + i / 16.0f);
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    turned[i] = (t[i] + t[i + 4]) / 2;
    turned[i + 4] = (i == 0 ? t[4] - t[0] : t[i] - t[i + 4]) / 2;
  }
  int y[8], point[8], odd = 0;
  nearest(y, turned);
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int difference = i == 0 ? -y[4] : y[i + 4];
    point[i] = (y[i] + difference) / 2;
    point[i + 4] = (y[i] - difference) / 2;
  }
  u32 word = 0;
  int largest = 0;
  float top = -1;
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int from_lowest = point[i] + Q / 2 + 1024 * Q, field = from_lowest % Q;  // 1024: even
    odd ^= from_lowest / Q & 1;
    word |= (u32)(i < 4 ? field : field & ~1) << i * BITS;
    values[i] = field - Q / 2 + 0.5f + i / 16.0f;
    if (fabsf(values[i]) > top) top = fabsf(values[i]), largest = i;
  }
  word |= (u32)odd << 4 * BITS;
  #pragma unroll
  for (int i = 0; i < 3; ++i) word |= (u32)(index >> i & 1) << (5 + i) * BITS;
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (odd && i == largest) values[i] += values[i] > 0 ? -Q : Q;
    values[i] *= step;
  }
  return word;
}

__device__ __forceinline__ void store_word(u8* row, int word, u32 v, int bytes) {
  for (int i = 0; i < bytes; ++i) row[word * bytes + i] = (u8)(v >> 8 * i);
}
__device__ __forceinline__ void fit_word(Scratch& s, int word, const float* x, const float* values) {
  float product = 0, square = 0;
  #pragma unroll
  for (int i = 0; i < 8; ++i) product += x[i] * values[i], square += values[i] * values[i];
  s.products[word] = product;
  s.squares[word] = square;
}
// The first of the least.
template <int COUNT> __device__ __forceinline__ int least(const float* v) {
  int at = 0;
  for (int i = 1; i < COUNT; ++i) if (v[i] < v[at]) at = i;
  return at;
}

__device__ __forceinline__ bool is_less(float a, int a_at, float b, int b_at) { return a < b || (a == b && a_at < b_at); }

// At 4 and 3 bits.
template <int BITS> __device__ __forceinline__ void encode_shaped(Scratch& s, u8* row) {
  const int word = threadIdx.x / TRIES, attempt = threadIdx.x % TRIES;
  const float* const x = s.x + 8 * word;
  float values[8];
  u32 found = 0;
  if (word < WORDS) {
    found = try_step<BITS>(values, x, attempt);
    float error = 0;
    #pragma unroll
    for (int i = 0; i < 8; ++i) error += (x[i] - values[i]) * (x[i] - values[i]);
    s.error[word][attempt] = error;
  }
  __syncthreads();
  if (word < WORDS && least<TRIES>(s.error[word]) == attempt) {
    store_word(row, word, found, BITS);
    fit_word(s, word, x, values);
  }
}

// At 2 bits: lanes 8 c to 8 c + 7 look through coset c, for both halves of a word.
__device__ __forceinline__ void encode_factored(Scratch& s, u8* row, const uint2* halves) {
  const int lane = threadIdx.x % 32, coset = lane / 8;
  auto entry = [&](float* v, int at) {
    const uint2 raw = halves[at];
    v[0] = from_half((u16)raw.x), v[1] = from_half((u16)(raw.x >> 16)), v[2] = from_half((u16)raw.y), v[3] = from_half((u16)(raw.y >> 16));
  };
  for (int word = threadIdx.x / 32; word < WORDS; word += THREADS / 32) {
    float x[8], best[2] = {1e30f, 1e30f};
    int found[2] = {0, 0};
    #pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = s.x[8 * word + j];
    #pragma unroll 4
    for (int i = lane % 8; i < 128; i += 8) {
      float v[4], norm = 0;
      entry(v, 128 * coset + i);
      #pragma unroll
      for (int j = 0; j < 4; ++j) norm += v[j] * v[j];
      #pragma unroll
      for (int half = 0; half < 2; ++half) {
        float distance = norm / 2;
        #pragma unroll
        for (int j = 0; j < 4; ++j) distance -= v[j] * x[4 * half + j];
        if (distance < best[half]) best[half] = distance, found[half] = i;
      }
    }
    #pragma unroll
    for (int half = 0; half < 2; ++half)
      #pragma unroll
      for (int m = 1; m < 8; m *= 2) {
        const float other = __shfl_xor_sync(~0u, best[half], m);
        const int at = __shfl_xor_sync(~0u, found[half], m);
        if (is_less(other, at, best[half], found[half])) best[half] = other, found[half] = at;
      }
    float error = best[0] + best[1];
    int code = (coset * 128 + found[0]) * 128 + found[1];
    #pragma unroll
    for (int m = 8; m < 32; m *= 2) {
      const float other = __shfl_xor_sync(~0u, error, m);
      const int of_other = __shfl_xor_sync(~0u, code, m);
      if (is_less(other, of_other, error, code)) error = other, code = of_other;
    }
    if (lane == 0) {
      float values[8];
      entry(values, code / 128);
      entry(values + 4, code / 16384 * 128 + code % 128);
      store_word(row, word, (u32)code, 2);
      fit_word(s, word, x, values);
    }
  }
}

template <int BITS> __device__ __forceinline__ void encode(Scratch& s, u8* row, const uint2* halves) {
  if constexpr (BITS > 2) encode_shaped<BITS>(s, row);
  else encode_factored(s, row, halves);
}

// keys, values [tokens][kv_heads][DIM]; factors [DIM]: what keys are multiplied by first, null for none.
// slots: page · PAGE_TOKENS + place in it, negative where a token is not kept. Grid: tokens, 2 · kv_heads.
extern "C" __global__ void __launch_bounds__(THREADS)
write_tokens(const u16* keys, const u16* values, const long long* slots, const uint2* halves, const float* factors, u8* pages, int kv_heads, int page_bytes,
      int key_token, int key_head, int value_token, int value_head) {
  __shared__ Scratch s;
  const int head = blockIdx.y % kv_heads, lane = threadIdx.x % 32;
  const bool is_value = blockIdx.y >= kv_heads;
  let_next_start();
  wait_for_previous();
  const long long slot = slots[blockIdx.x];
  if (slot < 0) return;
  const u16* const from = is_value ? values + (size_t)blockIdx.x * value_token + head * value_head : keys + (size_t)blockIdx.x * key_token + head * key_head;
  const int row_bytes = WORDS * (is_value ? VALUE_BITS : KEY_BITS), place = head * PAGE_TOKENS + (int)(slot % PAGE_TOKENS);
  u8* const part = pages + slot / PAGE_TOKENS * page_bytes + (is_value ? kv_heads * PAGE_TOKENS * (WORDS * KEY_BITS + 2) : 0);
  u16* const scale = (u16*)(part + kv_heads * PAGE_TOKENS * row_bytes) + place;
  const float reach = (is_value ? VALUE_BITS : KEY_BITS) == 2 ? 5 : 6;

  for (int i = threadIdx.x; i < DIM; i += THREADS) s.x[i] = from16(from[i]) * (factors && !is_value ? factors[i] : 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    mix(s.x, lane);
    float total = 0, largest = 0;
    for (int word = lane; word < WORDS; word += 32) {
      float energy = 0;
      for (int i = 0; i < 8; ++i) energy += s.x[8 * word + i] * s.x[8 * word + i];
      total += energy;
      largest = max(largest, energy);
    }
    #pragma unroll
    for (int m = 1; m < 32; m *= 2) {
      total += __shfl_xor_sync(~0u, total, m);
      largest = max(largest, __shfl_xor_sync(~0u, largest, m));
    }
    const float mean = sqrtf(total / WORDS / 8), first = from_half(finite_half(mean == mean ? max(mean, sqrtf(largest) / reach) : mean));
    if (lane == 0) s.divisor = first;
  }
  __syncthreads();
  const float first = s.divisor;
  const bool usable = first > 0;  // 0 and NaN leave nothing to divide by: such vectors get the words of zeros
  for (int i = threadIdx.x; i < DIM; i += THREADS) s.x[i] = usable ? s.x[i] / first : 0;
  __syncthreads();
  u8* const row = part + place * row_bytes;
  if (is_value) encode<VALUE_BITS>(s, row, halves);
  else encode<KEY_BITS>(s, row, halves);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float product = 0, square = 0;
  for (int word = lane; word < WORDS; word += 32) product += s.products[word], square += s.squares[word];
  #pragma unroll
  for (int m = 1; m < 32; m *= 2) {
    product += __shfl_xor_sync(~0u, product, m);
    square += __shfl_xor_sync(~0u, square, m);
  }
  if (lane == 0) *scale = usable ? finite_half(first * (product / square)) : finite_half(first);
}
