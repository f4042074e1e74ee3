// What the kernels that search the trellis have in common: costs, and the way back along the best path.
//
// Costs are halves: the least cost is subtracted at every step, distances are sums of squares of small differences, and
// so their errors are relative; on N(0, 1) the path is as good as with fp32 costs. Two nodes share every instruction.
// Macros: K0, K1 own bits of even and odd steps of the walk, which goes from the last pair to the first; SCALE of weights and values,
// in which squares of differences of 1/1000 are still normal halves; FAR: weights beyond count as this, so that no square overflows.
static constexpr int LEAST = K0 < K1 ? K0 : K1, MOST = K0 < K1 ? K1 : K0;
static constexpr int NODES = 1 << (16 - LEAST);  // at most, before or after a step
static constexpr int START = 1 << (16 - K0);     // before step 0
static constexpr u32 INFINITE = 0x7C007C00u;

__device__ __forceinline__ u32 low2(u32 a) { return __byte_perm(a, a, 0x1010); }
__device__ __forceinline__ u32 high2(u32 a) { return __byte_perm(a, a, 0x3232); }
__device__ __forceinline__ u32 cost2(u32 first, u32 second, u32 x0, u32 x1, u32 before) {
  u32 a = subtract2(first, x0), b = subtract2(second, x1);
  return fma2(b, b, fma2(a, a, before));
}
// The pair at step t of the walk.
__device__ __forceinline__ u32 scaled_pair(const float2* strip, int steps, int t) {
  const float2 x = strip[steps - 1 - t];
  return pack_half(SCALE * fminf(fmaxf(x.x, -FAR), FAR), SCALE * fminf(fmaxf(x.y, -FAR), FAR));
}

// The best of the states that leave through `node`, by a warp. pairs: [states' lowest 16 - MOST bits][highest MOST] half2, so
// that those of a node are side by side. before: what the nodes cost before this step.
template <int IN, int OUT>
__device__ __forceinline__ int best_state(u32 x, const u32* pairs, const u16* before, int node) {
  constexpr int LOW = 16 - MOST;
  const u32* mine = pairs + ((node & ((1 << LOW) - 1)) << MOST) + (node >> LOW);
  u32 least = ~0u;
  #pragma unroll
  for (int h = threadIdx.x % 32; h < 1 << OUT; h += 32) {
    const u32 pair = __ldg(mine + (h << (MOST - OUT)));
    const u32 m = __ldcg(before + ((h << (16 - OUT) | node) >> IN));  // another processor may have written it
    const u32 c = cost2(pair & 0xFFFF, pair >> 16, x & 0xFFFF, x >> 16, m) & 0xFFFF;
    least = min(least, c << 16 | h);
  }
  least = __reduce_min_sync(~0u, least);
  return (least & 0xFFFF) << (16 - OUT) | node;
}

// A warp follows a strip's best path back, from `node` at the end to step `stop`; states may be null. xs: pairs as the walk
// comes to them. history [steps][NODES] halves: the costs before each step. Returns the node before `stop`.
__device__ int trace(const u32* xs, const u32* pairs, const u16* history, long long* states, int steps, int shift, int stop, int node, int start) {
  for (int i = steps - 1; i >= stop; --i) {
    const int t = (i + shift) % steps;
    const bool even = K0 == K1 || t % 2 == 0;
    const u16* before = history + (size_t)i * NODES;
    int state;
    if (i == 0) state = start >> (16 - K0 - K1) << (16 - (even ? K1 : K0)) | node;
    else if (even) state = best_state<K0, K1>(xs[t], pairs, before, node);
    else state = best_state<K1, K0>(xs[t], pairs, before, node);
    if (states && threadIdx.x % 32 == 0) states[steps - 1 - t] = state;
    node = state >> (even ? K0 : K1);
  }
  return node;
}
