// Attention of one query a sequence over a paged E8 cache (glq/kv/pages.py), all query heads of a kv head together.
//
// A block has a share of one sequence's tokens and one kv head, a warp 16 tokens of these at a time: a tile. Words become operands of mma
// in registers. Products are transposed, so that tokens, or channels of values, are rows, and query heads columns (8 a HEADS8):
//   scores [16 tokens, heads] = keys [tokens, channels] · q,   sums [channels, heads] = valuesᵀ [channels, 16 tokens] · weights.
// Row r of scores is token 2 r, row 8 + r token 2 r + 1. Any order of channels will do for keys, so a register has one coordinate of two words of a token.
// Vectors' scales are not multiplied into them but into scores and weights: those of values as logarithms, so that the greatest weight
// times scale is 1, whatever the scales are. Sums stay as they are while the highest score grows by less than SLACK powers of two.
// q is divided by the factors that keys were multiplied by (a null pointer for none), and rotated as they were; join_shares joins the blocks' sums and rotates back.
// Macros, besides BF16 = 0: DIM, KEY_BITS, VALUE_BITS, PAGE_TOKENS, HEADS8, WARPS, RESIDENT; OUT_BF16: the type of q and out; MAX_SHARES.

static constexpr int WORDS = DIM / 8, TILE = 16, HEADS = 8 * HEADS8;
static constexpr int KEY_PAIRS = (WORDS + 7) / 8, KEY_WORDS = 2 * KEY_PAIRS, VALUE_WORDS = (WORDS + 7) / 8;  // of a lane
static constexpr int KEY_ROW = WORDS * KEY_BITS, VALUE_ROW = WORDS * VALUE_BITS;  // bytes (a word of 8 channels has as many as bits a channel)
static constexpr int SUMS = HEADS8 * VALUE_WORDS * 16;  // of a lane
static constexpr bool AHEAD = SUMS <= 64;  // whether there are registers for words of values while keys are decoded, and for those of keys
static constexpr float LOG2_E = 1.44269504f, LOWEST = -1e30f, SLACK = 8, LEAST_SCALE = 1.0f / (1 << 26);

__device__ __forceinline__ float from_query(u16 v) { return OUT_BF16 ? from_bf16(v) : from_half(v); }
__device__ __forceinline__ u16 to_out(float v) { return (u16)(OUT_BF16 ? pack_bf16(v, 0) : pack_half(v, 0)); }

// COUNT words of BITS bits of a row of ROW bytes, in registers.
template <int BITS, int COUNT, int ROW> struct Words {
  static constexpr int BYTES = COUNT * BITS, REGISTERS = (BYTES + 3) / 4, PLACE = (ROW | BYTES | 16) & -(ROW | BYTES | 16);
  u32 r[REGISTERS];
  __device__ __forceinline__ void load(const u8* p) {
    if constexpr (PLACE == 16)
      #pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) load16(r + 4 * i, p + 16 * i);
    else if constexpr (PLACE == 8)
      #pragma unroll
      for (int i = 0; i < BYTES / 8; ++i) load8(r + 2 * i, p + 8 * i);
    else if constexpr (PLACE == 4)
      #pragma unroll
      for (int i = 0; i < BYTES / 4; ++i) load4(r + i, p + 4 * i);
    else {
      static_assert(PLACE == 2 || BITS == 3, "words begin at whole bytes");
      constexpr int PIECE = PLACE == 2 ? 2 : 1;
      clear();
      #pragma unroll
      for (int i = 0; i < BYTES / PIECE; ++i) r[PIECE * i / 4] |= (u32)(PIECE == 2 ? ((const u16*)p)[i] : p[i]) << 8 * PIECE * i % 32;
    }
  }
  __device__ __forceinline__ void clear() {
    #pragma unroll
    for (int i = 0; i < REGISTERS; ++i) r[i] = 0;
  }
  // The word and, at 3 bits, other bits above it.
  __device__ __forceinline__ u32 word(int j) const {
    const int i = BITS * j / 4, shift = BITS * j % 4 * 8;
    const u32 v = shift + 8 * BITS <= 32 ? r[i] >> shift : __funnelshift_r(r[i], r[i + 1 < REGISTERS ? i + 1 : i], shift);
    return BITS == 2 ? v & 0xFFFF : v;
  }
};

// What a block works at.
struct Share {
  int head, sequence, length, begin, end, first, last;  // tokens that are seen: begin … end - 1; tiles of the block: first … last - 1
};
__device__ __forceinline__ Share share_of(const int* lengths, int window, int kv_heads) {
  Share s;
  s.head = blockIdx.y % kv_heads;
  s.sequence = blockIdx.y / kv_heads;
  s.end = lengths[s.sequence];
  s.begin = window > 0 ? max(s.end - window, 0) : 0;
  const int tile = s.begin / TILE, tiles = (s.end + TILE - 1) / TILE - tile, each = (tiles + gridDim.x - 1) / gridDim.x;
  s.first = tile + blockIdx.x * each;
  s.last = min(s.first + each, tile + tiles);
  return s;
}

// A head of q, rotated, as a column of mma's operand b; and what its products are to be multiplied by.
__device__ __forceinline__ void prepare_query(const u16* q, const float* factors, float* x, uint2* fragments, float* size, int row, float scale, int lane) {
  float largest = 0;
  if (q) {
    for (int i = lane; i < DIM; i += 32) x[i] = from_query(q[i]) * (factors ? reciprocal(factors[i]) : 1);
    __syncwarp();
    mix(x, lane);
    for (int i = lane; i < DIM; i += 32) largest = max(largest, fabsf(x[i]));
    #pragma unroll
    for (int m = 1; m < 32; m *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, m));
  }
  const float inverse = largest > 0 ? 1 / largest : 0;
  auto at = [&](int i) { return q && i < DIM ? x[i] * inverse : 0; };
  for (int i = lane; i < KEY_PAIRS * 16; i += 32) {
    const int t = i % 4, step = i / 4, channel = 8 * (KEY_WORDS * t + step / 4 * 2) + step % 4 * 2;
    fragments[(row / 8 * KEY_PAIRS * 4 + step) * 32 + row % 8 * 4 + t] =
        make_uint2(pack_half(at(channel), at(channel + 8)), pack_half(at(channel + 1), at(channel + 9)));
  }
  if (lane == 0) size[row] = largest * scale;
}

// parts: [sequences][kv_heads · group][gridDim.x][DIM + 2]: sums, the highest score in powers of two, the sum of weights.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
attend(const u16* q, const u8* pages, const int* page_table, const int* lengths, const uint4* of_tables, const float* factors, float* parts, int scale_bits,
       int softcap_bits, int window, int kv_heads, int group, int page_bytes, int table_row, int q_row, int q_head) {
  extern __shared__ __align__(16) u8 memory[];
  __shared__ float size[HEADS], highest_of[WARPS][HEADS], sum_of[WARPS][HEADS];
  Tables& tables = *(Tables*)memory;
  uint2* const fragments = (uint2*)(memory + sizeof(Tables));
  float* const rows = (float*)(fragments + HEADS8 * KEY_PAIRS * 4 * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  let_next_start();
  auto fill = [&](int from, int end) {
    for (int i = from / 16 + threadIdx.x; i < end / 16; i += 32 * WARPS) ((uint4*)memory)[i] = of_tables[i];
  };
  if (KEY_BITS == 4 || VALUE_BITS == 4) fill(0, STEPS_AT[0]);
  if (KEY_BITS == 3 || VALUE_BITS == 3) fill(STEPS_AT[0], HALVES_AT);
  if (KEY_BITS == 2 || VALUE_BITS == 2) fill(HALVES_AT, sizeof(Tables));
  wait_for_previous();

  const Share share = share_of(lengths, window, kv_heads);
  const int first_head = share.head * group;
  auto part_of = [&](int r) { return parts + (((size_t)share.sequence * kv_heads * group + first_head + r) * gridDim.x + blockIdx.x) * (DIM + 2); };
  if (share.first >= share.last) {
    if (threadIdx.x < group) part_of(threadIdx.x)[DIM] = LOWEST, part_of(threadIdx.x)[DIM + 1] = 0;
    return;
  }
  // Where a lane's bytes of a page's first tile are.
  const int key_scales = kv_heads * PAGE_TOKENS * KEY_ROW, values = key_scales + kv_heads * PAGE_TOKENS * 2;
  const int value_scales = values + kv_heads * PAGE_TOKENS * VALUE_ROW, token = share.head * PAGE_TOKENS;
  const int keys_at = (token + 2 * g) * KEY_ROW + t * KEY_WORDS * KEY_BITS, scales_at = key_scales + (token + 2 * g) * 2;
  const int values_at = values + (token + 4 * t) * VALUE_ROW + g * VALUE_WORDS * VALUE_BITS, to_value_scales = value_scales - key_scales;
  const int* const table = page_table + (size_t)share.sequence * table_row;
  Words<KEY_BITS, KEY_WORDS, KEY_ROW> key[2];
  Words<VALUE_BITS, VALUE_WORDS, VALUE_ROW> value[4];
  u32 two_key_scales, two_value_scales;
  auto page_of = [&](int tile) { return table[tile * TILE / PAGE_TOKENS]; };
  auto fetch_keys = [&](int page, int tile) {
    const int at = tile * TILE % PAGE_TOKENS;
    const u8* const from = pages + (size_t)page * page_bytes;
    #pragma unroll
    for (int i = 0; i < 2; ++i)
      if (t * KEY_WORDS < WORDS) key[i].load(from + keys_at + (at + i) * KEY_ROW);
      else key[i].clear();
    load4(&two_key_scales, from + scales_at + at * 2);
  };
  auto fetch_values = [&](int page, int tile) {
    const int at = tile * TILE % PAGE_TOKENS;
    const u8* const from = pages + (size_t)page * page_bytes;
    #pragma unroll
    for (int i = 0; i < 4; ++i)
      if (g * VALUE_WORDS < WORDS) value[i].load(from + values_at + (at + i) * VALUE_ROW);
      else value[i].clear();
    load4(&two_value_scales, from + scales_at + to_value_scales + at * 2);
  };

  int tile = share.first + warp;
  int page = 0, next_page = 0;
  if (tile < share.last) {
    page = page_of(tile);
    fetch_keys(page, tile);
    if (AHEAD) fetch_values(page, tile);
    if (tile + WARPS < share.last) next_page = page_of(tile + WARPS);
  }

  for (int r = warp; r < HEADS; r += WARPS)
    prepare_query(r < group ? q + (size_t)share.sequence * q_row + (first_head + r) * q_head : nullptr, factors, rows + r * DIM, fragments, size, r,
                  __int_as_float(scale_bits), lane);
  __syncthreads();

  const float cap = __int_as_float(softcap_bits), to_cap = cap > 0 ? 2 * LOG2_E / cap : 0;
  float highest[HEADS8][2], sum[HEADS8][2], to_score[HEADS8][2], sums[HEADS8][VALUE_WORDS][4][4];
  #pragma unroll
  for (int n = 0; n < HEADS8; ++n) {
    #pragma unroll
    for (int e = 0; e < 2; ++e) {
      highest[n][e] = LOWEST;
      sum[n][e] = 0;
      to_score[n][e] = size[8 * n + 2 * t + e] * (cap > 0 ? 1 : LOG2_E);
    }
    #pragma unroll
    for (int i = 0; i < VALUE_WORDS * 16; ++i) sums[n][i / 16][i / 4 % 4][i % 4] = 0;
  }

  #pragma unroll 1
  for (; tile < share.last; tile += WARPS) {
    float score[HEADS8][4];
    #pragma unroll
    for (int i = 0; i < HEADS8 * 4; ++i) score[i / 4][i % 4] = 0;
    #pragma unroll
    for (int p = 0; p < KEY_PAIRS; ++p) {
      u32 x[8], y[8];
      decode2<KEY_BITS>(x, key[0].word(2 * p), key[0].word(2 * p + 1), tables);
      decode2<KEY_BITS>(y, key[1].word(2 * p), key[1].word(2 * p + 1), tables);
      #pragma unroll
      for (int s = 0; s < 4; ++s) {
        const u32 a[4] = {x[2 * s], y[2 * s], x[2 * s + 1], y[2 * s + 1]};
        #pragma unroll
        for (int n = 0; n < HEADS8; ++n) {
          const uint2 b = fragments[((n * KEY_PAIRS + p) * 4 + s) * 32 + lane];
          mma(score[n], a, b.x, b.y);
        }
      }
    }
    const float key_scale[2] = {from_half((u16)two_key_scales), from_half((u16)(two_key_scales >> 16))};
    const int next = tile + WARPS;
    if (!AHEAD) fetch_values(page, tile);
    else if (next < share.last) fetch_keys(next_page, next);

    // Scores, in powers of two, with the values' scales
    float value_scale[2] = {from_half((u16)two_value_scales), from_half((u16)(two_value_scales >> 16))};
    bool grows = false;
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = tile * TILE + 2 * g + i;
      const bool seen = at >= share.begin && at < share.end;
      if (value_scale[i] < LEAST_SCALE) value_scale[i] = LEAST_SCALE;
      const float more = log_2(value_scale[i]);
      value_scale[i] = seen ? reciprocal(value_scale[i]) : 0;
      #pragma unroll
      for (int n = 0; n < HEADS8; ++n)
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = score[n][2 * i + e];
          s *= to_score[n][e] * key_scale[i];
          if (cap > 0) s = cap * LOG2_E * (1 - 2 * reciprocal(1 + power_of_2(s * to_cap)));
          s = seen ? s + more : LOWEST * 2;
          grows |= s > highest[n][e] + SLACK;
        }
    }
    if (any_lane(grows))
      #pragma unroll
      for (int n = 0; n < HEADS8; ++n)
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
          float top = max(highest[n][e], max(score[n][e], score[n][2 + e]));
          #pragma unroll
          for (int m = 4; m < 32; m *= 2) top = max(top, __shfl_xor_sync(~0u, top, m));
          const float share_of_before = power_of_2(highest[n][e] - top);
          highest[n][e] = top;
          sum[n][e] *= share_of_before;
          #pragma unroll
          for (int i = 0; i < VALUE_WORDS * 8; ++i) sums[n][i / 8][i / 2 % 4][i % 2 * 2 + e] *= share_of_before;
        }
    u32 weights[HEADS8][2];
    #pragma unroll
    for (int n = 0; n < HEADS8; ++n)
      #pragma unroll
      for (int i = 0; i < 2; ++i) {
        float w[2];
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
          w[e] = power_of_2(score[n][2 * i + e] - highest[n][e]);
          sum[n][e] += w[e] * value_scale[i];
        }
        weights[n][i] = transpose8x8(pack_half(w[0], w[1]));
      }

    #pragma unroll
    for (int j = 0; j < VALUE_WORDS; ++j) {
      u32 x[8], y[8];
      decode2<VALUE_BITS>(x, value[0].word(j), value[2].word(j), tables);
      decode2<VALUE_BITS>(y, value[1].word(j), value[3].word(j), tables);
      #pragma unroll
      for (int s = 0; s < 4; ++s) {
        const u32 a[4] = {x[2 * s], x[2 * s + 1], y[2 * s], y[2 * s + 1]};
        #pragma unroll
        for (int n = 0; n < HEADS8; ++n) mma(sums[n][j][s], a, weights[n][0], weights[n][1]);
      }
    }
    if (next < share.last) {
      if (AHEAD) fetch_values(next_page, next);
      else fetch_keys(page = next_page, next);
      if (next + WARPS < share.last) next_page = page_of(next + WARPS);
    }
  }

  // What the warps have, together
  #pragma unroll
  for (int n = 0; n < HEADS8; ++n)
    #pragma unroll
    for (int e = 0; e < 2; ++e) {
      #pragma unroll
      for (int m = 4; m < 32; m *= 2) sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], m);
      if (g == 0) {
        highest_of[warp][8 * n + 2 * t + e] = highest[n][e];
        sum_of[warp][8 * n + 2 * t + e] = sum[n][e];
      }
    }
  __syncthreads();
  float* const of_warps = (float*)memory;  // [WARPS][SUMS][32], in place of all else
  #pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    const int n = i / (VALUE_WORDS * 16), head = 8 * n + 2 * t + i % 2;
    float top = highest_of[0][head];
    #pragma unroll
    for (int w = 1; w < WARPS; ++w) top = max(top, highest_of[w][head]);
    of_warps[(warp * SUMS + i) * 32 + lane] = sums[n][i / 16 % VALUE_WORDS][i / 4 % 4][i % 4] * power_of_2(highest[n][i % 2] - top);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < group * DIM; at += 32 * WARPS) {
    const int head = at / DIM, channel = at % DIM, word = channel / 8, i = channel % 8;
    const int index = ((head / 8 * VALUE_WORDS + word % VALUE_WORDS) * 16 + i * 2 + head % 2) * 32 + word / VALUE_WORDS * 4 + head % 8 / 2;
    float total = 0;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) total += of_warps[w * SUMS * 32 + index];
    part_of(head)[channel] = total;
  }
  if (threadIdx.x < group) {
    float top = LOWEST, all = 0;
    for (int w = 0; w < WARPS; ++w) top = max(top, highest_of[w][threadIdx.x]);
    for (int w = 0; w < WARPS; ++w) all += sum_of[w][threadIdx.x] * power_of_2(highest_of[w][threadIdx.x] - top);
    part_of(threadIdx.x)[DIM] = top;
    part_of(threadIdx.x)[DIM + 1] = all;
  }
}

// The rest of attend: a block a head. Grid: heads, sequences.
extern "C" __global__ void __launch_bounds__(128)
join_shares(const float* parts, u16* out, int shares, int out_row, int out_head) {
  __shared__ float x[DIM], share_of[MAX_SHARES];
  let_next_start();
  const float* const mine = parts + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * shares * (DIM + 2);
  wait_for_previous();
  const int lane = threadIdx.x % 32;  // each warp finds the shares' weights for itself
  float top = LOWEST, all = 0;
  for (int i = lane; i < shares; i += 32) top = max(top, mine[i * (DIM + 2) + DIM]);
  #pragma unroll
  for (int m = 1; m < 32; m *= 2) top = max(top, __shfl_xor_sync(~0u, top, m));
  for (int i = lane; i < shares; i += 32) {
    const float* const part = mine + i * (DIM + 2) + DIM;
    const float weight = part[1] == 0 ? 0 : power_of_2(part[0] - top);
    if (threadIdx.x < 32) share_of[i] = weight;
    all += weight * part[1];
  }
  #pragma unroll
  for (int m = 1; m < 32; m *= 2) all += __shfl_xor_sync(~0u, all, m);
  __syncthreads();
  for (int c = threadIdx.x; c < DIM; c += 128) {
    float total = 0;
    #pragma unroll 16
    for (int i = 0; i < shares; ++i) total += share_of[i] == 0 ? 0 : share_of[i] * mine[i * (DIM + 2) + c];
    x[c] = all == 0 ? 0 : total / all;
  }
  __syncthreads();
  if (threadIdx.x < 32) mix(x, lane);
  __syncthreads();
  u16* const to = out + (size_t)blockIdx.y * out_row + blockIdx.x * out_head;
  for (int c = threadIdx.x; c < DIM; c += 128) to[c] = to_out(x[c]);
}
