// Rotary position embedding of queries and keys, and keys and values into the pages of a KV cache.
// A thread has 16 bytes of a head, or twice 16 where the columns that turn together lie half a head apart.
// Macros: those of ptx.cuh; HEAD (columns of a head), ROTATED (of them, the first), HALVES (whether column i turns with i + ROTATED / 2, else 2i with 2i + 1).

static constexpr int THREADS = 128;
static constexpr int TURNS = ROTATED / (HALVES ? 16 : 8);               // threads of a head that turn something
static constexpr int OF_TURNED = TURNS + (HEAD - ROTATED) / 8;          // threads of a head of queries or keys
static constexpr int OF_COPIED = HEAD / 8;                              // of one of values
static_assert(HEAD % 8 == 0 && ROTATED % (HALVES ? 16 : 8) == 0 && ROTATED <= HEAD, "whole pieces of 16 bytes");

struct Angles {
  uint4 cosines, sines;  // of eight pairs; of four where these are neighbours

  // at: of a position, ROTATED / 2 cosines and as many sines.
  __device__ __forceinline__ void load(const u16* at, int piece) {
    if (HALVES) {
      cosines = *(const uint4*)(at + 8 * piece);
      sines = *(const uint4*)(at + ROTATED / 2 + 8 * piece);
    } else {
      const uint2 c = *(const uint2*)(at + 4 * piece), s = *(const uint2*)(at + ROTATED / 2 + 4 * piece);
      cosines = make_uint4(c.x, c.y, 0, 0), sines = make_uint4(s.x, s.y, 0, 0);
    }
  }
};
__device__ __forceinline__ float number(const uint4& v, int i) { return from16((u16)((&v.x)[i / 2] >> i % 2 * 16)); }
// x and y: eight columns each that turn together.
__device__ __forceinline__ void turn_halves(uint4& x, uint4& y, const Angles& by) {
  u32* const a = &x.x;
  u32* const b = &y.x;
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x0 = number(x, 2 * i), x1 = number(x, 2 * i + 1), y0 = number(y, 2 * i), y1 = number(y, 2 * i + 1);
    const float c0 = number(by.cosines, 2 * i), c1 = number(by.cosines, 2 * i + 1), s0 = number(by.sines, 2 * i), s1 = number(by.sines, 2 * i + 1);
    a[i] = pack16(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
    b[i] = pack16(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
  }
}
// x: four pairs.
__device__ __forceinline__ void turn_neighbours(uint4& x, const Angles& by) {
  u32* const a = &x.x;
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x0 = number(x, 2 * i), x1 = number(x, 2 * i + 1), c = number(by.cosines, i), s = number(by.sines, i);
    a[i] = pack16(x0 * c - x1 * s, x1 * c + x0 * s);
  }
}

// q, k, v: 16-bit values of `tokens` tokens, whose first ones lie q_stride, k_stride and v_stride apart, whole heads in a row; positions [tokens]; angles
// [positions][ROTATED]: cosines, then sines; slots [written]: places in the cache of the first tokens, pages · page_size + place in the page, negative: none.
// to_q, to_k: the same, turned, token after token. keys, values: the cache's, in which pages, places and heads lie so many values apart.
// Pointers and strides are multiples of 16 bytes. Nothing that runs ahead of this kernel and lets it start early writes positions, angles or slots.
extern "C" __global__ void __launch_bounds__(THREADS)
rope(const u16* q, const u16* k, const u16* v, const long long* positions, const u16* angles, const long long* slots, u16* to_q, u16* to_k, u16* keys, u16* values,
     int q_stride, int k_stride, int v_stride, int q_heads, int k_heads, int written, int page_size, int page_stride, int place_stride, int head_stride) {
  let_next_start();
  const int token = blockIdx.x, of_queries = q_heads * OF_TURNED, of_turned = of_queries + k_heads * OF_TURNED;
  int i = blockIdx.y * THREADS + threadIdx.x;
  if (i >= of_turned + k_heads * OF_COPIED) return;
  const bool turned = i < of_turned, query = i < of_queries;
  i -= query ? 0 : turned ? of_queries : of_turned;
  const int head = i / (turned ? OF_TURNED : OF_COPIED), piece = i % (turned ? OF_TURNED : OF_COPIED);
  const bool turns = turned && piece < TURNS, pair = HALVES && turns;
  const int col = turned && !turns ? ROTATED + 8 * (piece - TURNS) : 8 * piece;
  Angles by;
  if (turns) by.load(angles + positions[token] * ROTATED, piece);
  const long long slot = !query && token < written ? slots[token] : -1;
  const u16* const from = (query ? q + (size_t)token * q_stride : turned ? k + (size_t)token * k_stride : v + (size_t)token * v_stride) + head * HEAD + col;
  wait_for_previous();
  uint4 x = *(const uint4*)from, y = make_uint4(0, 0, 0, 0);
  if (pair) y = *(const uint4*)(from + ROTATED / 2);
  if (pair) turn_halves(x, y, by);
  else if (turns) turn_neighbours(x, by);
  auto put = [&](u16* to) {
    *(uint4*)to = x;
    if (pair) *(uint4*)(to + ROTATED / 2) = y;
  };
  if (turned) put((query ? to_q + (size_t)token * q_heads * HEAD : to_k + (size_t)token * k_heads * HEAD) + head * HEAD + col);
  if (slot >= 0) put((turned ? keys : values) + slot / page_size * page_stride + slot % page_size * place_stride + (size_t)head * head_stride + col);
}
