// Viterbi over the bit-shift trellis of codecs/viterbi.py: a block walks STRIPS strips at once around their circles.
//
// Macros: K0, K1 as in viterbi.cuh, STRIPS strips a block, LANES threads that together hold every node once,
// GROUPS groups of them that share the rows of states; of the values that a thread reads at every step, HELD stay in its
// registers and KEPT in shared memory (where all steps have the same bits), and the rest comes from the L2 cache.
static constexpr int THREADS = LANES * GROUPS, WARPS = LANES / 32;

// The values of all states, in their order, and the part of them that this thread has at hand.
struct Values {
  const u32 *first, *second;
  u32 f[HELD + 1], g[HELD + 1];
  uint2* kept;  // [KEPT][THREADS]

  // `j` numbers what a thread reads in a step, which is at `at`; it is a constant where loops are unrolled.
  __device__ __forceinline__ uint2 get(int j, int at) const {
    if (j < HELD) return make_uint2(f[j], g[j]);
    if (j < HELD + KEPT) return kept[(j - HELD) * THREADS + threadIdx.x];
    return make_uint2(__ldg(first + at), __ldg(second + at));
  }
};

// Shared memory: before [NODES][STRIPS] halves, partial [GROUPS - 1][NODES / 2][STRIPS], least [WARPS][STRIPS], xs.
struct Shared {
  u16* before; u32* partial; u32* least; u32* xs; int* starts;
  __device__ Shared(u8* at, int steps) {
    before = (u16*)at; at += NODES * STRIPS * 2;
    partial = (u32*)at; at += (GROUPS - 1) * (NODES / 2) * STRIPS * 4;
    least = (u32*)at; at += WARPS * STRIPS * 4;
    xs = (u32*)at; at += STRIPS * steps * 4;
    starts = (int*)at;
  }
};

__device__ __forceinline__ void load_before(u32* m, const u16* at) {  // STRIPS costs of one node, each in both halves
  if constexpr (STRIPS == 8) {
    uint4 v = *(const uint4*)at; u32 w[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; ++i) { m[2 * i] = low2(w[i]); m[2 * i + 1] = high2(w[i]); }
  } else if constexpr (STRIPS == 4) {
    uint2 v = *(const uint2*)at;
    m[0] = low2(v.x); m[1] = high2(v.x); m[2] = low2(v.y); m[3] = high2(v.y);
  } else if constexpr (STRIPS == 2) {
    u32 v = *(const u32*)at; m[0] = low2(v); m[1] = high2(v);
  } else {
    m[0] = *at * 0x10001u;
  }
}

template <int OUT>
struct Rows {  // of states that leave through every node: how they are spread over the threads
  static constexpr int ROW = 1 << (15 - OUT), PAIRS = ROW / LANES, COUNT = (1 << OUT) / GROUPS;  // ROW in node pairs
  static __device__ __forceinline__ int at(int r, int q) {
    return (threadIdx.x / LANES * COUNT + r) * ROW + q * LANES + threadIdx.x % LANES;
  }
};

// To be read at every step. Only where rows are the same ones in all of them.
__device__ __forceinline__ void hold(Values& v) {
  if constexpr (HELD + KEPT > 0) {
    using R = Rows<K0>;
    #pragma unroll
    for (int r = 0; r < R::COUNT; ++r)
      #pragma unroll
      for (int q = 0; q < R::PAIRS; ++q) {
        const int j = r * R::PAIRS + q, at = R::at(r, q);
        if (j < HELD) { v.f[j] = v.first[at]; v.g[j] = v.second[at]; }
        else if (j < HELD + KEPT) v.kept[(j - HELD) * THREADS + threadIdx.x] = make_uint2(v.first[at], v.second[at]);
      }
  }
}

// Step i of a walk, at pair t, which has IN bits of its own; the next one has OUT. first and second are in the order of
// the states: row h holds those whose OUT highest bits are h, and the node they leave through is their place in it.
template <int IN, int OUT>
__device__ __forceinline__ void step(const Shared& s, const Values& v, u32* history, int steps, int i, int t) {
  using R = Rows<OUT>;
  constexpr int ROW = R::ROW, PAIRS = R::PAIRS;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  u32 x0[STRIPS], x1[STRIPS], best[PAIRS][STRIPS];
  #pragma unroll
  for (int k = 0; k < STRIPS; ++k) {
    u32 x = s.xs[k * steps + t]; x0[k] = low2(x); x1[k] = high2(x);
    #pragma unroll
    for (int q = 0; q < PAIRS; ++q) best[q][k] = INFINITE;
  }
  #pragma unroll UNROLL
  for (int r = 0; r < R::COUNT; ++r) {
    #pragma unroll
    for (int q = 0; q < PAIRS; ++q) {
      const int at = R::at(r, q);
      const uint2 w = v.get(r * PAIRS + q, at);
      u32 m[STRIPS];
      load_before(m, s.before + (2 * at >> IN) * STRIPS);
      #pragma unroll
      for (int k = 0; k < STRIPS; ++k) best[q][k] = min2(best[q][k], cost2(w.x, w.y, x0[k], x1[k], m[k]));
    }
  }
  if (GROUPS > 1 && group > 0) {
    #pragma unroll
    for (int q = 0; q < PAIRS; ++q)
      #pragma unroll
      for (int k = 0; k < STRIPS; ++k) s.partial[((group - 1) * ROW + q * LANES + lane) * STRIPS + k] = best[q][k];
  }
  __syncthreads();
  u32 least[STRIPS];
  if (group == 0) {
    #pragma unroll
    for (int k = 0; k < STRIPS; ++k) {
      u32 before = INFINITE;  // the least cost of the step before: near enough to keep costs small
      for (int w = 0; w < WARPS; ++w) before = min2(before, s.least[w * STRIPS + k]);
      before = min2(low2(before), high2(before));
      least[k] = INFINITE;
      #pragma unroll
      for (int q = 0; q < PAIRS; ++q) {
        const int pair = q * LANES + lane;
        u32 b = best[q][k];
        for (int o = 0; o < GROUPS - 1; ++o) b = min2(b, s.partial[(o * ROW + pair) * STRIPS + k]);
        b = subtract2(b, before);
        least[k] = min2(least[k], b);
        s.before[2 * pair * STRIPS + k] = (u16)b;
        s.before[(2 * pair + 1) * STRIPS + k] = (u16)(b >> 16);
        if (i + 1 < steps) history[((size_t)k * steps + i + 1) * (NODES / 2) + pair] = b;
      }
      #pragma unroll
      for (int o = 16; o; o >>= 1) least[k] = min2(least[k], __shfl_xor_sync(~0u, least[k], o));
    }
  }
  __syncthreads();
  if (group == 0 && lane % 32 == 0) {
    #pragma unroll
    for (int k = 0; k < STRIPS; ++k) s.least[lane / 32 * STRIPS + k] = least[k];
  }
}

// One way around, from pair `shift`. history [STRIPS of this block][steps][NODES] halves: the costs before each step.
__device__ __forceinline__ void walk(const Shared& s, const Values& v, u32* history, int steps, int shift, bool closed) {
  for (int i = threadIdx.x; i < NODES * STRIPS; i += THREADS)
    s.before[i] = closed && i / STRIPS != s.starts[i % STRIPS] ? 0x7C00 : 0;
  for (int i = threadIdx.x; i < WARPS * STRIPS; i += THREADS) s.least[i] = 0;
  __syncthreads();
  for (int i = 0; i < steps; ++i) {
    const int t = (i + shift) % steps;
    if (K0 == K1 || t % 2 == 0) step<K0, K1>(s, v, history, steps, i, t);
    else step<K1, K0>(s, v, history, steps, i, t);
  }
  __syncthreads();
}

// x [strips][steps], filled up to whole blocks; first and second [65536] halves and pairs as in best_state, times SCALE.
// history [strips][steps][NODES] halves of scratch; states [strips][steps].
extern "C" __global__ void __launch_bounds__(THREADS)
viterbi(const float2* x, const u32* first, const u32* second, const u32* pairs, u32* history, long long* states, int steps) {
  extern __shared__ __align__(16) u8 memory[];
  const Shared s(memory + KEPT * THREADS * sizeof(uint2), steps);
  wait_for_previous();
  Values v;
  v.first = first; v.second = second; v.kept = (uint2*)memory;
  hold(v);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t strip = (size_t)blockIdx.x * STRIPS;
  history += strip * steps * (NODES / 2);
  for (int i = threadIdx.x; i < STRIPS * steps; i += THREADS) s.xs[i] = scaled_pair(x + (strip + i / steps) * steps, steps, i % steps);
  walk(s, v, history, steps, steps / 2, false);
  for (int k = warp; k < STRIPS; k += THREADS / 32) {
    u32 least = ~0u;
    for (int i = lane; i < START; i += 32) least = min(least, (u32)s.before[i * STRIPS + k] << 16 | i);
    const int node = __reduce_min_sync(~0u, least) & 0xFFFF;
    const u16* mine = (const u16*)history + (size_t)k * steps * NODES;
    s.starts[k] = trace(s.xs + k * steps, pairs, mine, nullptr, steps, steps / 2, steps - steps / 2, node, 0);
  }
  __syncthreads();
  walk(s, v, history, steps, 0, true);
  for (int k = warp; k < STRIPS; k += THREADS / 32) {
    const u16* mine = (const u16*)history + (size_t)k * steps * NODES;
    trace(s.xs + k * steps, pairs, mine, states + (strip + k) * steps, steps, 0, 0, s.starts[k], s.starts[k]);
  }
}
