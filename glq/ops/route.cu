// The order in which prefill.cu wants the pairs of a token and one of its experts: those of an expert after each other, and filled up to
// whole blocks of TOKENS.
// Macros: TOKENS, WORDS (of 32 bits that an element of expert_of has).
static constexpr int THREADS = 512, WARPS = THREADS / 32, MOST = 1024;  // experts

// expert_of [pairs] → blocks [1 + blocks]: how many there are, and each one's expert; slots [blocks · TOKENS]: pairs, in their order, or −1.
// Blocks of threads from `experts` on write zeros to those rows of y [pairs, rows] whose pairs have none of the experts.
extern "C" __global__ void __launch_bounds__(THREADS)
route(const int* expert_of, int* blocks, int* slots, u16* y, int pairs, int experts, int rows) {
  __shared__ int counts[MOST];
  __shared__ int before[WARPS];
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = blockIdx.x;
  wait_for_previous();
  if (own >= experts) {
    for (int p = own - experts; p < pairs; p += gridDim.x - experts) {
      const int e = expert_of[(size_t)p * WORDS];
      if (e >= 0 && e < experts) continue;
      for (int i = threadIdx.x; i < rows; i += THREADS) y[(size_t)p * rows + i] = 0;
    }
    return;
  }
  for (int e = threadIdx.x; e < experts; e += THREADS) counts[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < pairs; p += THREADS) {
    const int e = expert_of[(size_t)p * WORDS];
    if (e >= 0 && e < experts) atomicAdd(counts + e, 1);
  }
  __syncthreads();
  int first = 0;  // block, of this expert
  for (int e = lane; e < own; e += 32) first += (counts[e] + TOKENS - 1) / TOKENS;
  #pragma unroll
  for (int d = 16; d; d /= 2) first += __shfl_sync(~0u, first, lane ^ d);
  const int held = (counts[own] + TOKENS - 1) / TOKENS;
  for (int i = threadIdx.x; i < held; i += THREADS) blocks[1 + first + i] = own;
  if (own == experts - 1 && threadIdx.x == 0) blocks[0] = first + held;
  int found = 0;  // so far
  for (int base = 0; base < pairs; base += THREADS) {
    const int p = base + threadIdx.x;
    const bool is = p < pairs && expert_of[(size_t)p * WORDS] == own;
    const u32 same = __ballot_sync(~0u, is);
    __syncthreads();  // the counts of the turn before are read
    if (lane == 0) before[warp] = __popc(same);
    __syncthreads();
    int at = found + __popc(same & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) at += before[w];
      found += before[w];
    }
    if (is) slots[first * TOKENS + at] = p;
  }
  for (int i = found + threadIdx.x; i < held * TOKENS; i += THREADS) slots[first * TOKENS + i] = -1;
}
