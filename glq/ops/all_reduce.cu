// y = the sum of x over ranks, each on a GPU that reaches the memory of the others: a thread sends 16 bytes of x to all of them, and adds up what
// they send. There are neither barriers nor flags: what is EMPTY (exchange.cuh) is not there yet.
//
// An inbox has three turns, each with a part for every sender. A call takes one, and makes that of the call before EMPTY again; who is ahead writes to
// the third, and is ahead by one call at most, since a call needs what the others send in theirs. Each block counts its own calls, because
// those for fewer tokens have fewer blocks.
// Macros: BF16, RANKS.
static constexpr int THREADS = 128, TURNS = 3;

// Of pairs of numbers, in fp32 and in the order of the ranks, so that all get the same.
template <typename Word> __device__ __forceinline__ u32 add_up(const uint4 (&from)[RANKS], Word word) {
  float low = 0, high = 0;
  #pragma unroll
  for (int i = 0; i < RANKS; ++i) low += from16((u16)word(from[i])), high += from16((u16)(word(from[i]) >> 16));
  return pack16(low, high);
}

// x, y: [count] of 16 bytes; inboxes: of each rank, [TURNS][RANKS][capacity]; turns [blocks].
extern "C" __global__ void __launch_bounds__(THREADS)
all_reduce(const uint4* x, uint4* y, uint4* const* inboxes, int* turns, int rank, int count, int capacity) {
  let_next_start();
  const int at = blockIdx.x * THREADS + threadIdx.x;
  uint4* const own = inboxes[rank];
  wait_for_previous();
  const int turn = turns[blockIdx.x], last = turn ? turn - 1 : TURNS - 1;
  auto place = [&](int turn, int sender) { return (size_t)(turn * RANKS + sender) * capacity + at; };
  uint4 from[RANKS];
  if (at < count) {
    const uint4 v = x[at], mine = make_uint4(min(v.x, EMPTY - 1), min(v.y, EMPTY - 1), min(v.z, EMPTY - 1), min(v.w, EMPTY - 1));
    #pragma unroll
    for (int i = 0; i < RANKS; ++i) {
      if (i == rank) from[i] = mine;
      else store_shared_by_system(inboxes[i] + place(turn, rank), mine);
    }
  }
  if (at < capacity) {  // all threads: the call before may have had more to add up
    #pragma unroll
    for (int i = 0; i < RANKS; ++i) own[place(last, i)] = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
  }
  if (at < count) {
    bool there;
    do {
      there = true;
      #pragma unroll
      for (int i = 0; i < RANKS; ++i) {
        if (i == rank) continue;
        from[i] = load_shared_by_system(own + place(turn, i));
        there &= is_there(from[i]);
      }
    } while (!there);
    y[at] = make_uint4(
        add_up(from, [](uint4 v) { return v.x; }), add_up(from, [](uint4 v) { return v.y; }),
        add_up(from, [](uint4 v) { return v.z; }), add_up(from, [](uint4 v) { return v.w; }));
  }
  __syncthreads();  // all know which turn it was
  if (threadIdx.x == 0) turns[blockIdx.x] = turn == TURNS - 1 ? 0 : turn + 1;
}
