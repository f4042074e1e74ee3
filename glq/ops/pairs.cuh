// Which pairs (of a token and one of its experts) a block multiplies together: up to CAP pairs of one expert are a segment.
// Every block finds all segments for itself, by one warp, in shared memory. Pairs of other experts than 0 … experts − 1 are
// in none.
// Macros: NT (8 pairs of a segment each); SORTED: pairs come in the order of their experts, in global memory; else up to 2^15
// pairs, which the warp sorts.

static constexpr int CAP = 8 * NT;

struct Segment {
  u16 expert, count;
#if SORTED
  int first;  // pairs first … first + count − 1 of the order
#else
  u16 pairs[CAP];
#endif
};

// The segments of 32 experts, a lane each, after the `at` segments that are there. begin: of the expert's pairs in the order.
// → how many segments there are now; start: the expert's first one.
__device__ __forceinline__ int add_segments(Segment* to, int at, int expert, int count, int begin, int& start) {
  const int lane = threadIdx.x % 32, own = (count + CAP - 1) / CAP;
  int sum = own;
  #pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }
  start = at + sum - own;
  for (int j = 0; j < own; ++j) {
    Segment& s = to[start + j];
    s.expert = (u16)expert;
    s.count = (u16)min(CAP, count - j * CAP);
#if SORTED
    s.first = begin + j * CAP;
#endif
  }
  return at + __shfl_sync(~0u, sum, 31);
}

#if SORTED
struct Pairs {
  const int* order;  // pairs by expert, those of none last
  const int* ends;   // [experts], of each expert's pairs
  Segment* segments;
  int* total;  // segments

  __device__ Pairs(u8* memory, const int* order, const int* ends, int, int, int, int)
      : order(order), ends(ends), segments((Segment*)(memory + 16)), total((int*)memory) {}
  __device__ __forceinline__ int of(const Segment& s, int slot) const { return order[s.first + slot]; }
  __device__ __forceinline__ void find(int, int experts) const {
    const int lane = threadIdx.x % 32;
    int found = 0, start;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane, begin = e > 0 && e < experts ? ends[e - 1] : 0;
      found = add_segments(segments, found, e, e < experts ? ends[e] - begin : 0, begin, start);
    }
    if (lane == 0) *total = found;
  }
  // each(pair): of every `step`-th pair without an expert, from the `first` on.
  template <typename F> __device__ __forceinline__ void others(int pairs, int experts, int first, int step, F each) const {
    for (int i = ends[experts - 1] + first; i < pairs; i += step) each(order[i]);
  }
};
#else
struct Pairs {
  static constexpr u32 NONE = ~0u;
  const int* expert_of;
  int words;           // of 32 bits that an element of expert_of has
  Segment* segments;   // [limit]
  int* total;          // segments
  u32* keys;           // [pairs]: expert, and the pair's number among the expert's
  u16 *counts, *used;  // [experts]; those that have pairs

  __device__ Pairs(u8* memory, const int*, const int* expert_of, int words, int limit, int pairs, int experts)
      : expert_of(expert_of), words(words), segments((Segment*)(memory + 16)), total((int*)memory) {
    keys = (u32*)(segments + limit);
    counts = (u16*)(keys + pairs);
    used = counts + experts;
  }
  __device__ __forceinline__ int of(const Segment& s, int slot) const { return s.pairs[slot]; }
  __device__ __forceinline__ void find(int pairs, int experts) const {
    const int lane = threadIdx.x % 32;
    for (int e = lane; e < experts; e += 32) counts[e] = 0;
    __syncwarp();
    const int in_use = count(pairs, experts);
    int found = 0, start;
    for (int base = 0; base < in_use; base += 32) {
      const bool is = base + lane < in_use;
      const int e = is ? used[base + lane] : 0;
      found = add_segments(segments, found, e, is ? counts[e] : 0, 0, start);
      if (is) counts[e] = (u16)start;
    }
    __syncwarp();
    for (int p = lane; p < pairs; p += 32) {
      const u32 key = keys[p], rank = key & 0xFFFF;
      if (key != NONE) segments[counts[key >> 16] + rank / CAP].pairs[rank % CAP] = (u16)p;
    }
    if (lane == 0) *total = found;
  }
  // counts and used and keys → how many experts have pairs.
  __device__ __forceinline__ int count(int pairs, int experts) const {
    const int lane = threadIdx.x % 32;
    const u32 below = (1u << lane) - 1;
    int in_use = 0;
    for (int base = 0; base < pairs; base += 32) {
      const int p = base + lane, e = p < pairs ? expert_of[(size_t)p * words] : -1;
      const bool is = e >= 0 && e < experts;
      const u32 same = __match_any_sync(~0u, is ? e : -1);
      const int rank = (is ? counts[e] : 0) + __popc(same & below);
      const u32 firsts = __ballot_sync(~0u, is && rank == 0);
      if (is && rank == 0) used[in_use + __popc(firsts & below)] = (u16)e;
      if (is && !(same >> lane >> 1)) counts[e] = (u16)(rank + 1);
      if (p < pairs) keys[p] = is ? (u32)e << 16 | rank : NONE;
      in_use += __popc(firsts);
      __syncwarp();
    }
    return in_use;
  }
  template <typename F> __device__ __forceinline__ void others(int pairs, int, int first, int step, F each) const {
    for (int p = first; p < pairs; p += step) if (keys[p] == NONE) each(p);
  }
};
#endif
