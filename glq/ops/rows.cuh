// Blocks of the rotation where width is 256 · CHUNKS: a warp has one token at a time (rotation.cuh).
// Macros: those of rotation.cuh.

static constexpr int WARPS = 4;
struct Row {
  int token, from;  // −1: there is none; from: which row of x it is
};
// The columns from `start` on of those that `next` gives.
template <typename Next> __device__ __forceinline__ void rotate_rows(const u16* x, const u8* signs, u16* out, int start, int held, int cols, Next next) {
  TokenRotation own(threadIdx.x % 32);
  own.take_signs(signs + start / 8);
  x += start;
  wait_for_previous();
  Row row = next();
  if (row.token < 0) return;
  own.request(x + (size_t)row.from * cols);
  #pragma unroll 1
  while (row.token >= 0) {
    const Row after = next();
    const u16* const from = x + (size_t)(after.token < 0 ? row : after).from * cols;
    own.rotate(out, start, row.token, held, cols / 64, [&](int chunk) { own.request(from, chunk); });
    row = after;
  }
}
__device__ __forceinline__ int first_of_warp() { return blockIdx.x * WARPS + uniform(threadIdx.x / 32); }
// Blocks of threads, as many as there are registers for.
static constexpr int TOGETHER = CHUNKS > 5 ? 3 : CHUNKS > 3 ? 4 : CHUNKS > 1 ? 5 : 10;
