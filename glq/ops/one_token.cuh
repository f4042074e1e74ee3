// One token, rotated by each block for itself, which saves a launch.
// Macros, besides those of units.cuh and input.cuh: BLOCK (width of the rotation; 0: x comes rotated, in tiles, and there is nothing here).

static constexpr int SQUARES_AT = 256 * WARPS, SCRATCH = BLOCK ? SQUARES_AT + (INPUT == NORM ? WARPS : 0) : 0;  // floats that the rotation needs

#if BLOCK
// One token of `cols` columns, which the kernel ahead may have made, into shared memory, in the order of its columns. Of its chunks of 256 columns those from
// `first` up to `chunks` and those up to `end`, all of them whole blocks of the rotation. scratch: SCRATCH floats.
__device__ __forceinline__ void rotate(u16* xs, float* scratch, const Input& input, const u8* signs, int cols, int chunks, int first, int end) {
  constexpr int CHUNKS = BLOCK / 256, AT_ONCE = WARPS / CHUNKS * CHUNKS;
  static_assert(BLOCK % 256 == 0 && AT_ONCE > 0, "a block takes a whole number of warps");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = chunks - first + min(first, end);
  auto col_of = [&](int at) { return (at < chunks - first ? first + at : at - (chunks - first)) * 256; };
  auto is_own = [&](int start) { return warp < AT_ONCE && start + warp < count; };
  Eight next;
  float divided = 1;
  auto request_constants = [&](int start) { if (is_own(start)) next.request_constants(input, signs, col_of(start + warp) + 8 * lane); };
  auto request = [&](int start) { if (is_own(start)) next.request(input, col_of(start + warp) + 8 * lane); };
  request_constants(0);
  wait_for_previous();
  request(0);
  if (INPUT == NORM) {
    const float squares = sum_squares(input, cols, THREADS, 0, blockIdx.x == 0 ? cols : 0);  // of all columns, whichever this block needs
    if (lane == 0) scratch[SQUARES_AT + warp] = squares;
  }
  #pragma unroll 1
  for (int start = 0; start < count; start += AT_ONCE) {
    if (is_own(start)) {
      float v[8];
      next.take(v);
      request_constants(start + AT_ONCE);
      request(start + AT_ONCE);
      hadamard256(v, lane);
      leave(v, scratch + 256 * warp, lane);
    }
    __syncthreads();
    if (INPUT == NORM && start == 0) divided = inverse_norm<WARPS>(scratch + SQUARES_AT, cols, input.eps);
    for (int i = threadIdx.x; i < min(AT_ONCE, count - start) / CHUNKS * 256; i += THREADS) {
      float v[CHUNKS];
      gather<CHUNKS>(v, scratch + i / 256 * BLOCK + i % 256);
      u16* const to = xs + col_of(start + i / 256 * CHUNKS) + i % 256;
      #pragma unroll
      for (int c = 0; c < CHUNKS; ++c) to[256 * c] = to16(v[c] * (rsqrtf((float)(BLOCK / odd_part(CHUNKS))) * divided));
    }
    __syncthreads();
  }
}
// The columns that a run of units needs.
__device__ __forceinline__ void rotate_for(const Work& work, int begin, int end, u16* xs, float* scratch, const Input& input, const u8* signs, int cols) {
  constexpr int CHUNKS = BLOCK / 256;
  const int from = begin % work.per_row, length = end - begin, chunks = cols / 256;
  const int first = from * WK * 64 / BLOCK * CHUNKS;
  const int past = (min(from + length, work.per_row) * WK * 64 + BLOCK - 1) / BLOCK * CHUNKS;  // of the first row
  const int wrapped = (max(from + length - work.per_row, 0) * WK * 64 + BLOCK - 1) / BLOCK * CHUNKS;
  rotate(xs, scratch, input, signs, cols, min(past, chunks), first, wrapped);
}
#endif
