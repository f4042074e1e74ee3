// One token, rotated by each block for itself, which saves a launch.
// Macros, besides those of units.cuh and input.cuh: BLOCK (width of the rotation; 0: x comes rotated, in tiles, and there is nothing here).

static constexpr int SQUARES_AT = 256 * WARPS, SCRATCH = BLOCK ? SQUARES_AT + (INPUT == NORM ? WARPS : 0) : 0;  // floats that the rotation needs

#if BLOCK
// One token of `cols` columns, which the kernel ahead may have made, into shared memory, in the order of its columns. Of its chunks of 256 columns those from
// `first` up to `chunks` and those up to `end`, all of them whole blocks of the rotation. scratch: SCRATCH floats. The first OTHERS warps have no chunks:
// they do what is to be done `meanwhile`. before_others: what each warp does before it waits for others. SIDE_BY_SIDE: so lies what is rotated, else in its place.
template <int OTHERS, bool SIDE_BY_SIDE, typename F, typename G>
__device__ __forceinline__ void rotate(u16* xs, float* scratch, const Input& input, const u8* signs, int cols, int chunks, int first, int end, F meanwhile, G before_others) {
  constexpr int CHUNKS = BLOCK / 256, AT_ONCE = WARPS / CHUNKS * CHUNKS, TAKERS = WARPS - OTHERS, EACH = (AT_ONCE + TAKERS - 1) / TAKERS;
  static_assert(BLOCK % 256 == 0 && AT_ONCE > 0, "a block takes a whole number of warps");
  constexpr bool EXACT = INPUT == PLAIN && BF16;
  const int lane = threadIdx.x % 32, taker = uniform(threadIdx.x / 32) - OTHERS, count = chunks - first + min(first, end);
  auto col_of = [&](int at) { return (at < chunks - first ? first + at : at - (chunks - first)) * 256; };
  Eight next[EACH];
  auto each_own = [&](int start, auto f) {
    #pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int at = taker + i * TAKERS;
      if (taker >= 0 && at < AT_ONCE && start + at < count) f(next[i], at, col_of(start + at) + 8 * lane);
    }
  };
  auto request_constants = [&](int start) { each_own(start, [&](Eight& of, int, int col) { of.request_constants(input, signs, col); }); };
  auto request = [&](int start) { each_own(start, [&](Eight& of, int, int col) { of.request(input, col); }); };
  request_constants(0);
  if (taker < 0) meanwhile();
  u32 sylvester[4];
  sylvester16(sylvester, lane, ONES_BF16);
  wait_for_previous();
  request(0);
  if (INPUT == NORM && taker >= 0) {
    const float squares = sum_squares(input, cols, threadIdx.x - 32 * OTHERS, 32 * TAKERS, 0, blockIdx.x == 0 ? cols : 0);  // of all columns, whichever this block needs
    if (lane == 0) scratch[SQUARES_AT + taker] = squares;
  }
  float by = rsqrtf((float)(BLOCK / odd_part(CHUNKS)));
  #pragma unroll 1
  for (int start = 0; start < count; start += AT_ONCE) {
    each_own(start, [&](Eight& of, int at, int) {
      u32 high[4], low[4];
      if (EXACT) of.take_signed(high);
      else {
        float v[8];
        of.take(v);
        #pragma unroll
        for (int i = 0; i < 4; ++i) split(v[2 * i], v[2 * i + 1], high[i], low[i]);
      }
      float sums[2][4];
      hadamard256<EXACT>(sums, high, low, sylvester);
      float* const to = scratch + 256 * at + (lane / 4 % 2 | lane / 8 * 8 | lane % 4 * 64);
      #pragma unroll
      for (int i = 0; i < 8; ++i) to[(i / 2 % 2 * 2 | i / 4 * 4) ^ lane % 4 * 2 | i % 2 * 32] = sums[i / 4][i % 4];
    });
    request_constants(start + AT_ONCE);
    request(start + AT_ONCE);
    if (start == 0) before_others();
    __syncthreads();
    if (INPUT == NORM && start == 0) by *= inverse_norm<TAKERS>(scratch + SQUARES_AT, cols, input.eps);
    for (int i = 2 * threadIdx.x; i < min(AT_ONCE, count - start) / CHUNKS * 256; i += 2 * THREADS) {  // two columns
      const float* const from = scratch + i / 256 * BLOCK + (i % 256 ^ i / 64 % 4 * 2);
      float v[2][CHUNKS];
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const float2 two = *(const float2*)(from + 256 * c);
        v[0][c] = two.x, v[1][c] = two.y;
      }
      across<CHUNKS>(v[0]);
      across<CHUNKS>(v[1]);
      const int chunk = start + i / 256 * CHUNKS;
      u16* const to = xs + (SIDE_BY_SIDE ? 256 * chunk : col_of(chunk)) + i % 256;
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c) *(u32*)(to + 256 * c) = pack16(v[0][c] * by, v[1][c] * by);
    }
    __syncthreads();
  }
}
// The first chunk of columns that a run needs, whose first unit is the from-th of its row.
__device__ __forceinline__ int first_chunk(int from) { return from * WK * 64 / BLOCK * (BLOCK / 256); }
// All that a run of `length` units needs.
template <int OTHERS, bool SIDE_BY_SIDE, typename F, typename G>
__device__ __forceinline__ void rotate_for(const Work& work, int from, int length, u16* xs, float* scratch, const Input& input, const u8* signs, int cols, F meanwhile, G before_others) {
  constexpr int CHUNKS = BLOCK / 256;
  const int chunks = cols / 256;
  const int past = (min(from + length, work.per_row) * WK * 64 + BLOCK - 1) / BLOCK * CHUNKS;  // of the first row
  const int wrapped = (max(from + length - work.per_row, 0) * WK * 64 + BLOCK - 1) / BLOCK * CHUNKS;
  rotate<OTHERS, SIDE_BY_SIDE>(xs, scratch, input, signs, cols, min(past, chunks), first_chunk(from), wrapped, meanwhile, before_others);
}
#endif
