// The order in which prefill.cu wants the pairs of a token and one of its experts: those of an expert after each other, and filled up to
// whole blocks of TOKENS.
// Macros: TOKENS, WORDS (of 32 bits that an element of expert_of has).
static constexpr int THREADS = 512, WARPS = THREADS / 32, MOST = 1024;  // experts
static constexpr int AT_ONCE = 4;

// Calls each(pair, expert) for a warp's equal part of all pairs, 32 after 32, a lane each; the expert of a pair beyond is −1.
template <typename F> __device__ __forceinline__ void for_pairs(const int* expert_of, int pairs, int warp, F each) {
  const int part = ((pairs + WARPS - 1) / WARPS + 31) / 32 * 32, end = min(pairs, part * (warp + 1));
  #pragma unroll 1
  for (int base = part * warp; base < end; base += 32 * AT_ONCE) {
    int experts[AT_ONCE];
    #pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int p = base + 32 * i + threadIdx.x % 32;
      experts[i] = p < end ? expert_of[(size_t)p * WORDS] : -1;
    }
    #pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) each(base + 32 * i + threadIdx.x % 32, experts[i]);
  }
}

// expert_of [pairs] → blocks [1 + blocks]: how many there are, and each one's expert; slots [blocks · TOKENS]: pairs, in their order, or −1.
// Blocks of threads from `experts` on write zeros to those rows of y [pairs, rows] whose pairs have none of the experts.
extern "C" __global__ void __launch_bounds__(THREADS)
route(const int* expert_of, int* blocks, int* slots, u16* y, int pairs, int experts, int rows) {
  __shared__ int counts[MOST];
  __shared__ int of_warps[WARPS];  // pairs of this expert
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = blockIdx.x;
  wait_for_previous();
  if (own >= experts) {
    for (int base = 32 * (WARPS * (own - experts) + warp); base < pairs; base += 32 * WARPS * (gridDim.x - experts)) {
      const int p = base + lane, e = p < pairs ? expert_of[(size_t)p * WORDS] : 0;
      for (u32 none = __ballot_sync(~0u, e < 0 || e >= experts); none; none &= none - 1) {
        const int row = base + __popc((none & 0u - none) - 1);  // the lowest of them
        for (int i = lane; i < rows; i += 32) y[(size_t)row * rows + i] = 0;
      }
    }
    return;
  }
  for (int e = threadIdx.x; e < experts; e += THREADS) counts[e] = 0;
  __syncthreads();
  int mine = 0;
  for_pairs(expert_of, pairs, warp, [&](int, int e) {
    if (e >= 0 && e < experts) atomicAdd(counts + e, 1);
    mine += __popc(__ballot_sync(~0u, e == own));
  });
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  int first = 0;  // block, of this expert
  for (int e = lane; e < own; e += 32) first += (counts[e] + TOKENS - 1) / TOKENS;
  #pragma unroll
  for (int d = 16; d; d /= 2) first += __shfl_sync(~0u, first, lane ^ d);
  const int count = counts[own], held = (count + TOKENS - 1) / TOKENS;
  for (int i = threadIdx.x; i < held; i += THREADS) blocks[1 + first + i] = own;
  if (own == experts - 1 && threadIdx.x == 0) blocks[0] = first + held;
  int* const to = slots + first * TOKENS;
  for (int i = count + threadIdx.x; i < held * TOKENS; i += THREADS) to[i] = -1;
  int at = 0;
  for (int w = 0; w < warp; ++w) at += of_warps[w];
  for_pairs(expert_of, pairs, warp, [&](int p, int e) {
    const u32 same = __ballot_sync(~0u, e == own);
    if (e == own) to[at + __popc(same & ((1u << lane) - 1))] = p;
    at += __popc(same);
  });
}
