// Sums of products of warpgroups, scaled, to y: fragments of 16 rows × 8 tokens (prefill.cu, batch.cu).
struct Output {
  u16* y;
  const void* scale;
  int tokens, rows;
  const int* pairs = nullptr;  // which token of y one is, or none (−1); null: y has them as they are

  // Of a lane's two rows of a fragment that begins at `row`, of one of several matrices.
  __device__ __forceinline__ float2 scales(int row, int matrix = 0) const {
    const int at = row + threadIdx.x % 32 / 4, first = matrix * rows;
    return make_float2(at < rows ? load_scale(scale, first + at) : 0, at + 8 < rows ? load_scale(scale, first + at + 8) : 0);
  }
  // By a warp, some time before it asks for them: they come from far.
  __device__ __forceinline__ void request_scales(int row, int matrix = 0) const {
    if (row < rows && threadIdx.x % 32 == 0) request_to_l2((const u8*)scale + ((size_t)matrix * rows + row) * SCALE_BYTES);
  }
  // Which token of y one is, or −1.
  __device__ __forceinline__ int place(int token) const { return pairs ? __ldg(pairs + token) : token < tokens ? token : -1; }
  // A fragment: sums of rows lane / 4 and 8 beyond, each of two tokens; place: of token lane / 4.
  __device__ __forceinline__ void put(float4 sum, float2 by, int row, int place) const {
    const int at = row + 2 * (threadIdx.x % 4);
    const u32 first = transpose(to16(sum.x * by.x) | (u32)to16(sum.y * by.x) << 16);
    const u32 second = transpose(to16(sum.z * by.y) | (u32)to16(sum.w * by.y) << 16);
    if (place < 0) return;
    u16* const to = y + (size_t)place * rows;
    put2(to, at, first);
    put2(to, at + 8, second);
  }
  __device__ __forceinline__ void put2(u16* to, int row, u32 pair) const {
    if (rows % 2 == 0) {
      if (row < rows) *(u32*)(to + row) = pair;
    } else {
      if (row < rows) to[row] = (u16)pair;
      if (row + 1 < rows) to[row + 1] = (u16)(pair >> 16);
    }
  }
};
