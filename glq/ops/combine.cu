// x of a product that no rotation makes on its way, as where there are many tokens: silu(gate) · up or a normed sum, rows of their own.
// Macros: those of input.cuh.

static constexpr int THREADS = 256;  // of a token

// Rows of 16-bit values, aligned to 16 bytes; eps, stride: Input's. Column counts are multiples of eight.
extern "C" __global__ void __launch_bounds__(THREADS)
combine(const u16* x, const u16* other, const u16* weight, u16* total, u16* out, int eps, int stride, int cols) {
  let_next_start();
  const int token = blockIdx.x;
  const Input input(x, other, weight, total, eps, stride, token, cols);
  float by = 1;
  wait_for_previous();
#if INPUT == 2
  __shared__ float squares[THREADS / 32];
  const float sum = sum_squares(input, cols, threadIdx.x, THREADS, 0, cols);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  by = inverse_norm<THREADS / 32>(squares, cols, input.eps);
#endif
  #pragma unroll 2
  for (int col = 8 * threadIdx.x; col < cols; col += 8 * THREADS) {
    Eight own;
    own.request_weight(input, col);
    own.request(input, col);
    own.negative = 0;
    float v[8];
    own.take(v);
    *(uint4*)(out + (size_t)token * cols + col) =
        make_uint4(pack16(v[0] * by, v[1] * by), pack16(v[2] * by, v[3] * by), pack16(v[4] * by, v[5] * by), pack16(v[6] * by, v[7] * by));
  }
}
