// Viterbi over the bit-shift trellis of codecs/viterbi.py: a cluster of blocks walks one strip around its circle.
//
// A block has a share of the nodes through which the walk leaves, and all states that leave through them: their values stay in
// its registers, and no minimum goes over blocks. What its nodes cost it sends to every block, into the half of a double
// buffer that nobody reads any more; a barrier in shared memory counts the bytes that come. So a step waits for one
// trip from a processor to another, and for nothing that was written to global memory.
// With alternating bits, shares are such that a block's states are the same ones in all steps: a state is, from its highest bit
// on, a row (MOST bits), a column and one bit for the half of an instruction. Where a step leaves through more nodes, the lowest
// bit of the row belongs to the node, above the column.
// Macros: K0, K1 as in viterbi.cuh, CLUSTER blocks of THREADS threads, of which a multiprocessor has room for ROOM.
static constexpr int COLUMNS = (1 << (15 - MOST)) / CLUSTER;                   // of a block
static constexpr int LANES = COLUMNS < THREADS ? COLUMNS : THREADS;           // threads that together hold every column once
static constexpr int GROUPS = THREADS / LANES;                                // of them, among which the rows are divided
static constexpr int PAIRS = COLUMNS / LANES, COUNT = (1 << MOST) / GROUPS;   // columns and rows of a thread
static constexpr int FINISHING = LANES < 32 ? 32 : LANES, WARPS = FINISHING / 32;
static constexpr int OWN = COLUMNS << (MOST - LEAST);                         // pairs of nodes of a block, at most
static constexpr int LEASTS = CLUSTER * WARPS;
static_assert(LANES >= 16 && LANES * GROUPS == THREADS && COUNT >= 2 && COUNT * GROUPS == 1 << MOST, "threads of no use");

// Shared memory: arrived [2], before [2][NODES] halves, partial [GROUPS - 1][OWN], least [2][LEASTS], xs [steps], start.
struct Shared {
  u64* arrived; u16* before; u32* partial; u32* least; u32* xs; int* start;
  __device__ Shared(u8* at, int steps) {
    arrived = (u64*)at; at += 16;
    before = (u16*)at; at += 2 * NODES * 2;
    partial = (u32*)at; at += (GROUPS - 1) * OWN * 4;
    least = (u32*)at; at += 2 * LEASTS * 4;
    xs = (u32*)at; at += steps * 4;
    start = (int*)at;
  }
};

struct Place {  // of this thread among the states
  int rank, lane, group;
  __device__ Place() : rank(blockIdx.x % CLUSTER), lane(threadIdx.x % LANES), group(threadIdx.x / LANES) {}
  __device__ __forceinline__ int column(int q) const { return rank * COLUMNS + q * LANES + lane; }
  __device__ __forceinline__ int row(int r) const { return group * COUNT + r; }
};

struct Values {  // of the two states of each row and column
  u32 first[COUNT][PAIRS], second[COUNT][PAIRS];
  __device__ __forceinline__ Values(const Place& p, const u32* firsts, const u32* seconds) {
    #pragma unroll
    for (int r = 0; r < COUNT; ++r)
      #pragma unroll
      for (int q = 0; q < PAIRS; ++q) {
        const int at = p.row(r) << (15 - MOST) | p.column(q);
        first[r][q] = firsts[at]; second[r][q] = seconds[at];
      }
  }
};

__device__ __forceinline__ u32 least_of(const u32* least) {  // by a warp: what all blocks found, in both halves
  u32 v = ~0u;
  #pragma unroll
  for (int i = threadIdx.x % 32; i < LEASTS; i += 32) v = min(v, least[i]);
  return low2(__reduce_min_sync(~0u, v));
}

// What a warp's nodes cost, two a lane and side by side, to every block's `to`.
__device__ __forceinline__ void send_costs(u32 costs, u32* to, u64* barrier) {
  constexpr int CHUNKS = (LANES < 32 ? LANES : 32) / 4;
  const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
  u32 v[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __shfl_sync(~0u, costs, 4 * chunk + i);
  #pragma unroll
  for (int i = 0; i < (CLUSTER * CHUNKS + 31) / 32; ++i) {
    const int rank = i * (32 / CHUNKS) + lane / CHUNKS;
    if (rank < CLUSTER) send16(rank, to + 4 * chunk, v, barrier);
  }
}

// The best of all rows for each column, from the best of each group's; less `least`. history: of these nodes, or null.
template <int KINDS>
__device__ __forceinline__ void finish(const Shared& s, const Place& p, const u32 (&best)[KINDS][PAIRS], u32 least, u32* history, int n) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32* after = (u32*)(s.before + (n + 1) % 2 * NODES);
  u64* barrier = s.arrived + n % 2;
  u32 mine = ~0u;
  #pragma unroll
  for (int e = 0; e < KINDS; ++e)
    #pragma unroll
    for (int q = 0; q < PAIRS; ++q) {
      u32 b = best[e][q];
      const int node = e << (15 - MOST) | p.column(q);  // the pair of them
      if (LANES >= 32 || lane < LANES) {
        #pragma unroll
        for (int o = 0; o < GROUPS - 1; ++o) b = min2(b, s.partial[o * OWN + e * COLUMNS + q * LANES + p.lane]);
        b = subtract2(b, least);
        mine = min(mine, min(b & 0xFFFF, b >> 16));  // as integers: costs are not negative
      }
      send_costs(b, after + (e << (15 - MOST)) + p.rank * COLUMNS + q * LANES + warp * 32, barrier);
      if (history && (LANES >= 32 || lane < LANES)) history[node] = b;
    }
  mine = __reduce_min_sync(~0u, mine);
  if (lane < CLUSTER) send4(lane, s.least + (n + 1) % 2 * LEASTS + p.rank * WARPS + warp, mine, barrier);
}

// Step n of all that this cluster makes, at a pair with the values x, which has IN bits of its own; the next one has OUT.
template <int IN, int OUT>
__device__ __forceinline__ void step(const Shared& s, const Place& p, const Values& v, u32 x, u32* history, int n) {
  constexpr int KINDS = OUT == MOST ? 1 : 2;
  if (threadIdx.x == 0) expect(s.arrived + n % 2, CLUSTER * 4 * (KINDS * COLUMNS + WARPS));
  const u16* before = s.before + n % 2 * NODES;
  const u32 x0 = low2(x), x1 = high2(x);
  u32 least = 0, best[KINDS][PAIRS];
  if (threadIdx.x < FINISHING) least = least_of(s.least + n % 2 * LEASTS);
  #pragma unroll
  for (int i = 0; i < KINDS * PAIRS; ++i) best[i / PAIRS][i % PAIRS] = INFINITE;
  uint4 eight;
  #pragma unroll
  for (int r = 0; r < COUNT; ++r) {
    constexpr bool BESIDE = IN + MOST == 16 && COUNT % 8 == 0;  // a node enters each row: eight of them in one load
    if (BESIDE && r % 8 == 0) eight = *(const uint4*)(before + p.row(r));
    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
    #pragma unroll
    for (int q = 0; q < PAIRS; ++q) {
      const int first = (p.row(0) << (16 - MOST) | 2 * p.column(q)) >> IN;
      const u32 m = !BESIDE ? low2(before[first + (r << (16 - MOST - IN))])
                            : r % 2 ? high2(words[r % 8 / 2]) : low2(words[r % 8 / 2]);
      u32& b = best[r % KINDS][q];
      b = min2(b, cost2(v.first[r][q], v.second[r][q], x0, x1, m));
    }
  }
  if (GROUPS > 1) {
    if (p.group > 0) {
      #pragma unroll
      for (int i = 0; i < KINDS * PAIRS; ++i)
        s.partial[(p.group - 1) * OWN + i / PAIRS * COLUMNS + i % PAIRS * LANES + p.lane] = best[i / PAIRS][i % PAIRS];
    }
    __syncthreads();
  }
  if (threadIdx.x < FINISHING) finish<KINDS>(s, p, best, least, history, n);
  await(s.arrived + n % 2, n / 2 & 1);
}

// `count` steps of a way around from pair `shift`, with `n` made before: from every node, or from `start` if that is none below 0.
// history [steps][NODES] halves: the costs before the steps from `kept` on.
__device__ __forceinline__ void walk(const Shared& s, const Place& p, const Values& v, u32* history, int steps, int count, int shift,
                                     int n, int start, int kept) {
  for (int i = threadIdx.x; i < NODES; i += THREADS) s.before[n % 2 * NODES + i] = start >= 0 && i != start ? 0x7C00 : 0;
  for (int i = threadIdx.x; i < LEASTS; i += THREADS) s.least[n % 2 * LEASTS + i] = 0;
  __syncthreads();
  for (int i = 0, t = shift; i < count; ++i) {
    u32* after = i + 1 < steps && i + 1 >= kept ? history + (size_t)(i + 1) * (NODES / 2) : nullptr;
    if (K0 == K1 || t % 2 == 0) step<K0, K1>(s, p, v, s.xs[t], after, n + i);
    else step<K1, K0>(s, p, v, s.xs[t], after, n + i);
    t = t + 1 == steps ? 0 : t + 1;
  }
}

// By a warp: the node before step 0 on the best path that ends anywhere, as the walk from the middle found it.
__device__ int find_start(const Shared& s, const u32* pairs, const u16* history, int steps) {
  u32 least = ~0u;
  for (int i = threadIdx.x % 32; i < START; i += 32) least = min(least, (u32)s.before[steps % 2 * NODES + i] << 16 | i);
  const int node = __reduce_min_sync(~0u, least) & 0xFFFF;
  return trace(s.xs, pairs, history, nullptr, steps, steps / 2, steps - steps / 2, node, 0);
}

// x [strips][steps]; first and second [65536] halves and pairs as in best_state, times SCALE.
// history [strips][steps][NODES] halves of scratch; states [strips][steps].
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, ROOM)
viterbi_cluster(const float2* x, const u32* first, const u32* second, const u32* pairs, u32* history, long long* states, int steps) {
  extern __shared__ __align__(16) u8 memory[];
  const Shared s(memory, steps);
  const Place p;
  const int strip = blockIdx.x / CLUSTER, middle = steps / 2;
  const bool traces = p.rank == 0 && threadIdx.x < 32;
  if (threadIdx.x == 0) {
    init_barrier(s.arrived, 1);
    init_barrier(s.arrived + 1, 1);
    publish_barriers();
  }
  wait_for_previous();
  history += (size_t)strip * steps * (NODES / 2);
  for (int i = threadIdx.x; i < steps; i += THREADS) s.xs[i] = scaled_pair(x + (size_t)strip * steps, steps, i);
  const Values v(p, first, second);
  sync_cluster();  // nothing is sent before all blocks have their barriers
  walk(s, p, v, history, steps, steps, middle, 0, -1, steps - middle);
  sync_cluster();  // the trace reads what other blocks wrote
  if (traces) {
    const int start = find_start(s, pairs, (const u16*)history, steps);
    if (threadIdx.x < CLUSTER) store_in(threadIdx.x, s.start, start);
  }
  sync_cluster();
  const int start = *s.start;
  walk(s, p, v, history, steps, steps - 1, 0, steps, start, 1);  // the last step's end is known
  sync_cluster();
  if (traces) trace(s.xs, pairs, (const u16*)history, states + (size_t)strip * steps, steps, 0, 0, start, start);
}
