// softmax(q Kᵀ · scale + mask) V for a few rows of q that share keys and values: one query, or some, of the heads of a group.
//
// A block takes ROWS rows and a run of keys. LANES lanes of a warp hold a key and its value, 8 numbers each, and DEPTH keys at a
// time; what lanes and warps have of a row is joined at the end. Where keys are cut into several runs, join_runs does the rest.
// Keys that the mask hides from all rows are not loaded: a cache may be far longer than what is in it.
// Macros, besides those of ptx.cuh: DIM (of a head, a multiple of 8), LANES (a power of two, ≥ DIM / 8), ROWS, WARPS, DEPTH; MASK: what
// it is made of; MASK_ROWS: 1 if all rows have the same, else ROWS.

static constexpr int NONE = 0, BOOL = 1, HALF = 2;  // else fp32
static constexpr int GROUPS = 32 / LANES;
static constexpr float LOG2_E = 1.44269504f, LEAST = -3.4e38f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }
__device__ __forceinline__ void unpack(float* v, uint4 raw) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
  #pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = from16((u16)(words[i / 2] >> 16 * (i % 2)));
}
// What a score weighs beside the highest one, both in powers of two.
__device__ __forceinline__ float weight(float score, float highest) { return score == minus_infinity() ? 0.0f : exp2f(score - highest); }

// What is added to a score, in powers of two.
__device__ __forceinline__ float bias_at(const u8* mask, size_t at) {
  if (MASK == NONE) return 0;
  if (MASK == BOOL) return mask[at] ? 0 : minus_infinity();
  const float v = MASK == HALF ? from16(((const u16*)mask)[at]) : ((const float*)mask)[at];
  return v == minus_infinity() ? v : max(v * LOG2_E, LEAST);
}

// parts: [gridDim.y][ROWS][gridDim.x][DIM + 2], where keys are cut. heads: of q, for each of k; queries: rows of each; run: keys of a block.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
attend(const u16* q, const u16* k, const u16* v, const u8* mask, u16* out, float* parts, int scale, int heads, int queries, int keys,
       int kv_heads, int run, int q_batch, int q_head, int q_row, int k_batch, int k_head, int k_row, int v_batch, int v_head, int v_row,
       int mask_batch, int mask_head, int mask_row, int mask_key, int out_batch, int out_head, int out_row) {
  let_next_start();
  __shared__ float highest_of[WARPS][ROWS], sum_of[WARPS][ROWS], mean_of[WARPS][ROWS][DIM];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / LANES, col = lane % LANES * 8;
  const int rows = heads * queries, chunks = (rows + ROWS - 1) / ROWS, first = blockIdx.y % chunks * ROWS;
  const size_t kv_head = blockIdx.y / chunks % kv_heads, batch = blockIdx.y / chunks / kv_heads;
  const int begin = blockIdx.x * run, end = min(begin + run, keys);
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  auto head_of = [&](int r) { return kv_head * heads + min(first + r, rows - 1) / queries; };
  auto query_of = [&](int r) { return (size_t)(min(first + r, rows - 1) % queries); };
  wait_for_previous();

  float x[ROWS][8], highest[ROWS], sum[ROWS], mean[ROWS][8];
  #pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    unpack(x[r], col < DIM ? *(const uint4*)(q + batch * q_batch + head_of(r) * q_head + query_of(r) * q_row + col) : zeros);
    highest[r] = minus_infinity();
    sum[r] = 0;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[r][i] *= __uint_as_float(scale) * LOG2_E;
      mean[r][i] = 0;
    }
  }
  // Another set of keys' highest score, sum of weights and weighted sum of values, with one's own.
  auto join = [&](int r, float other_highest, float other_sum, auto other_mean) {
    const float top = max(highest[r], other_highest), mine = weight(highest[r], top), others = weight(other_highest, top);
    highest[r] = top;
    sum[r] = sum[r] * mine + other_sum * others;
    #pragma unroll
    for (int i = 0; i < 8; ++i) mean[r][i] = mean[r][i] * mine + other_mean(i) * others;
  };

  const u16* const keys_at = k + batch * k_batch + kv_head * k_head + col, * const values_at = v + batch * v_batch + kv_head * v_head + col;
  #pragma unroll 1
  for (int start = begin + warp * GROUPS * DEPTH; start < end; start += WARPS * GROUPS * DEPTH) {
    float score[DEPTH][ROWS], bias[DEPTH][MASK_ROWS];
    uint4 key_words[DEPTH], value_words[DEPTH];
    #pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int key = start + d * GROUPS + group;
      bool seen = false;
      #pragma unroll
      for (int r = 0; r < MASK_ROWS; ++r) {
        bias[d][r] = key < end ? bias_at(mask, batch * mask_batch + head_of(r) * mask_head + query_of(r) * mask_row + (size_t)key * mask_key) : minus_infinity();
        seen |= bias[d][r] != minus_infinity();
      }
      key_words[d] = seen && col < DIM ? *(const uint4*)(keys_at + (size_t)key * k_row) : zeros;
      value_words[d] = seen && col < DIM ? *(const uint4*)(values_at + (size_t)key * v_row) : zeros;
    }
    #pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      float of_key[8];
      unpack(of_key, key_words[d]);
      #pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float dot = 0;
        #pragma unroll
        for (int i = 0; i < 8; ++i) dot += x[r][i] * of_key[i];
        #pragma unroll
        for (int m = 1; m < LANES; m *= 2) dot += __shfl_xor_sync(~0u, dot, m);
        score[d][r] = dot + bias[d][MASK_ROWS == 1 ? 0 : r];
      }
    }
    #pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float top = highest[r];
      #pragma unroll
      for (int d = 0; d < DEPTH; ++d) top = max(top, score[d][r]);
      const float before = weight(highest[r], top);
      highest[r] = top;
      sum[r] *= before;
      #pragma unroll
      for (int i = 0; i < 8; ++i) mean[r][i] *= before;
      #pragma unroll
      for (int d = 0; d < DEPTH; ++d) sum[r] += score[d][r] = weight(score[d][r], top);
    }
    #pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      float of_value[8];
      unpack(of_value, value_words[d]);
      #pragma unroll
      for (int r = 0; r < ROWS; ++r)
        #pragma unroll
        for (int i = 0; i < 8; ++i) mean[r][i] += score[d][r] * of_value[i];
    }
  }

  #pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    #pragma unroll
    for (int m = LANES; m < 32; m *= 2) {
      float other_mean[8];
      const float other_highest = __shfl_xor_sync(~0u, highest[r], m), other_sum = __shfl_xor_sync(~0u, sum[r], m);
      #pragma unroll
      for (int i = 0; i < 8; ++i) other_mean[i] = __shfl_xor_sync(~0u, mean[r][i], m);
      join(r, other_highest, other_sum, [&](int i) { return other_mean[i]; });
    }
    if (lane == 0) {
      highest_of[warp][r] = highest[r];
      sum_of[warp][r] = sum[r];
    }
    if (group == 0 && col < DIM)
      #pragma unroll
      for (int i = 0; i < 8; ++i) mean_of[warp][r][col + i] = mean[r][i];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < ROWS * DIM; at += 32 * WARPS) {
    const int r = at / DIM, i = at % DIM;
    if (first + r >= rows) continue;
    float top = minus_infinity(), all = 0, total = 0;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) top = max(top, highest_of[w][r]);
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float share = weight(highest_of[w][r], top);
      all += sum_of[w][r] * share;
      total += mean_of[w][r][i] * share;
    }
    if (gridDim.x == 1) {
      out[batch * out_batch + head_of(r) * out_head + query_of(r) * out_row + i] = to16(all > 0 ? total / all : 0);
      continue;
    }
    float* const part = parts + (((size_t)blockIdx.y * ROWS + r) * gridDim.x + blockIdx.x) * (DIM + 2);
    part[i] = total;
    if (i == 0) {
      part[DIM] = top;
      part[DIM + 1] = all;
    }
  }
}

// The rest of attend for keys in several runs. A block a row; grid [ROWS][gridDim.y of attend].
extern "C" __global__ void __launch_bounds__(DIM)
join_runs(const float* parts, u16* out, int heads, int queries, int kv_heads, int runs, int out_batch, int out_head, int out_row) {
  let_next_start();
  const int rows = heads * queries, chunks = (rows + ROWS - 1) / ROWS, row = blockIdx.y % chunks * ROWS + blockIdx.x;
  const size_t kv_head = blockIdx.y / chunks % kv_heads, batch = blockIdx.y / chunks / kv_heads;
  const float* const of_row = parts + ((size_t)blockIdx.y * ROWS + blockIdx.x) * runs * (DIM + 2);
  wait_for_previous();
  if (row >= rows) return;
  float top = minus_infinity(), all = 0, total = 0;
  for (int i = 0; i < runs; ++i) top = max(top, of_row[i * (DIM + 2) + DIM]);
  #pragma unroll 4
  for (int i = 0; i < runs; ++i) {
    const float* const part = of_row + i * (DIM + 2);
    const float share = weight(part[DIM], top);
    all += part[DIM + 1] * share;
    total += part[threadIdx.x] * share;
  }
  out[batch * out_batch + (kv_head * heads + row / queries) * out_head + (size_t)(row % queries) * out_row + threadIdx.x] = to16(all > 0 ? total / all : 0);
}
