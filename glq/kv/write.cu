// New tokens' keys and values into a paged E8 cache (glq/kv/pages.py): rotated, rounded to words as glq/kv/codec.py does it, stored.
//
// A block has one head vector. At 4 and 3 bits a thread tries one step for one word; at 2 bits a thread looks through half a word's
// entries of one coset. Points of the lattice are integers from where they are rounded.
// Macros, besides BF16 (the type of keys and values): DIM, KEY_BITS, VALUE_BITS, PAGE_TOKENS, THREADS.

static constexpr int WORDS = DIM / 8, TRIES = 9;

struct Scratch {
  float x[DIM], error[WORDS][TRIES], products[WORDS], squares[WORDS], divisor;
  int found[WORDS][TRIES];  // at 2 bits: entries
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

template <int BITS> __device__ __forceinline__ void encode(Scratch& s, u8* row, const uint2* halves) {
  constexpr int PARTS = BITS == 2 ? 8 : TRIES;
  const int word = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
  const float* const x = s.x + 8 * word;
  float values[8];
  if constexpr (BITS > 2) {
    u32 found = 0;
    if (word < WORDS) {
      found = try_step<BITS>(values, x, part);
      float error = 0;
      #pragma unroll
      for (int i = 0; i < 8; ++i) error += (x[i] - values[i]) * (x[i] - values[i]);
      s.error[word][part] = error;
    }
    __syncthreads();
    if (word < WORDS && least<TRIES>(s.error[word]) == part) {
      store_word(row, word, found, BITS);
      fit_word(s, word, x, values);
    }
  } else {
    auto entry = [&](float* v, int at) {
      const uint2 raw = halves[at];
      v[0] = from_half((u16)raw.x), v[1] = from_half((u16)(raw.x >> 16)), v[2] = from_half((u16)raw.y), v[3] = from_half((u16)(raw.y >> 16));
    };
    if (word < WORDS) {
      const int coset = part / 2, half = part % 2;
      float best = 1e30f;
      int found = 0;
      for (int i = 0; i < 128; ++i) {
        entry(values, 128 * coset + i);
        float distance = 0;
        #pragma unroll
        for (int j = 0; j < 4; ++j) distance += values[j] * (values[j] / 2 - x[4 * half + j]);
        if (distance < best) best = distance, found = i;
      }
      s.error[word][part] = best;
      s.found[word][part] = found;
    }
    __syncthreads();
    if (word < WORDS && part == 0) {
      float error[4];
      for (int i = 0; i < 4; ++i) error[i] = s.error[word][2 * i] + s.error[word][2 * i + 1];
      const int coset = least<4>(error), first = s.found[word][2 * coset], second = s.found[word][2 * coset + 1];
      store_word(row, word, (u32)((coset * 128 + first) * 128 + second), BITS);
      entry(values, 128 * coset + first);
      entry(values + 4, 128 * coset + second);
      fit_word(s, word, x, values);
    }
  }
}

// keys, values [tokens][kv_heads][DIM]; slots: page · PAGE_TOKENS + place in it, negative where a token is not kept. Grid: tokens, 2 · kv_heads.
extern "C" __global__ void __launch_bounds__(THREADS)
write_tokens(const u16* keys, const u16* values, const long long* slots, const uint2* halves, u8* pages, int kv_heads, int page_bytes,
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

  for (int i = threadIdx.x; i < DIM; i += THREADS) s.x[i] = from16(from[i]);
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
