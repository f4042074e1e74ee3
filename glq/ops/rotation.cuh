// A block of the rotation of one token, 256 · CHUNKS columns, by one warp, in its registers; and the order in which the kernels want them.
//
// x as it is in memory is an operand of tensor cores: a lane has four pairs of each 256 columns, 16 bytes. A product transforms along four bits of a column's
// number: 0, one of 1 and 2, and those by which lanes of four differ, 3 and 5. A second one, of its sums in tf32, transforms along the others: 4, 6 and 7,
// and KEPT, the other one of 1 and 2, which tells two products apart. Across chunks a lane has all values.
// Macros, besides that of input.cuh: CHUNKS; LAYOUT, of what is written: TILES of 64 columns for decode.cu, in rows of 72, of which the last 8 keep banks apart;
// SWIZZLED and FRAGMENTS, in rows of 64, ordered and swizzled for prefill.cu and batch.cu; ROWS, x as it was.

static constexpr int TILES = 0, SWIZZLED = 1, FRAGMENTS = 2;
// Where a column of a token lies.
__device__ __forceinline__ size_t place(int col, int token, int held, int tiles) {
  if (LAYOUT == TILES) return ((size_t)(col / 64) * held + token) * 72 + col % 64;
  if (LAYOUT != SWIZZLED && LAYOUT != FRAGMENTS) return (size_t)token * tiles * 64 + col;
  const int c = col % 64;
  const int at = LAYOUT == SWIZZLED ? c / 32 * 32 + c / 4 % 4 * 8 + c / 16 % 2 * 4 + c % 4  // as place_of_step has them
                                    : c / 4 % 4 * 16 + c / 2 % 2 * 8 + c / 16 * 2 + c % 2;  // as a step's fragment has them
  return ((size_t)(col / 64) * held + token) * 64 + (at ^ token % 8 * 8);
}

static constexpr int WIDTH = 256 * CHUNKS, POW = CHUNKS / odd_part(CHUNKS);
static constexpr int KEPT = LAYOUT == FRAGMENTS ? 2 : 1;

// What products multiply by, norms included: of 256 columns, and of the power of two in CHUNKS. With √2 or without, it is a number that x's type has times one that tf32 has, but
// for 5e-6; in bf16 1.000352 times as much, as tf32 cuts off what does not fit.
static constexpr bool ROOT = POW == 2 || POW == 8;
static constexpr u32 OF_16 = BF16 ? ROOT ? 0x3FD23FD2 : 0x3FF63FF6 : ROOT ? 0x3D583D58 : ONES;                // 210 / 128, 246 / 128, 171 / 128, 1
static constexpr float OF_8 = (BF16 ? ROOT ? 1766 / 2048.f : 1066 / 2048.f : ROOT ? 1084 / 1024.f : 1) / (16 * (POW == 1 ? 1 : POW < 8 ? 2 : 4));
static constexpr u32 MINUS = 1u << 31;
struct Sylvester {
  u32 first[4];   // a fragment of 16 × 16, whose row with its bits reversed is the number of a transformed column
  u32 second[2];  // of 8 × 8, as an operand on the right

  __device__ __forceinline__ Sylvester(int lane) {
    const int g = lane / 4, t = lane % 4;
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = g + i % 2 * 8, row = (m & 1) << 3 | (m & 2) << 1 | (m & 4) >> 1 | m >> 3, k = 2 * t + i / 2 * 8;
      first[i] = OF_16 ^ (u32)(__popc(row & k) & 1) << 15 ^ (u32)(__popc(row & (k + 1)) & 1) << 31;
      hold(first[i]);
    }
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      second[i] = __float_as_uint(OF_8) ^ (u32)((__popc(t & g / 2) ^ i & g) & 1) << 31;
      hold(second[i]);
    }
  }
};

// Where a lane's first column of a chunk is: bits 3 and 5 of its number are those of lane % 4; 4, 6 and 7 those of lane / 4.
__device__ __forceinline__ int first_column(int lane) { return 8 * (lane & 1 | lane >> 1 & 2 | lane << 1 & 4 | lane & 24); }

// Where a lane's columns of a token go.
struct Columns {
  u16* to;
  size_t step;  // from chunk to chunk

  __device__ __forceinline__ Columns(u16* out, int start, int token, int held, int tiles) {
    constexpr bool BY_TILES = LAYOUT == TILES || LAYOUT == SWIZZLED || LAYOUT == FRAGMENTS;
    constexpr int ROW = LAYOUT == TILES ? 72 : 64;
    const int lane = threadIdx.x % 32, tile = start / 64 + lane % 4, other = lane >> 2 & 1, five = lane >> 3 & 1, three = lane >> 4;
    to = out + ((size_t)(BY_TILES ? tile : token) * (BY_TILES ? held : tiles) + (BY_TILES ? token : tile)) * ROW;
    if (LAYOUT == FRAGMENTS) to += (three * 4 + other ^ token & 5) * 8 + five * 4;
    else if (LAYOUT == SWIZZLED) to += (five * 4 + three * 2 + other ^ token % 8) * 8;
    else to += five * 32 + three * 8 + other * 4;
    step = 4 * ROW * (size_t)(BY_TILES ? held : 1);
  }
  // sums[k][2i + j] of the next chunk: i is bit 0 of a column's number, j bit 4; 6 and 7 are those of lane % 4; the other one of 1 and 2, 5 and 3 those of lane / 4.
  __device__ __forceinline__ void put(const float (*sums)[4]) {
    hold(to);
    auto pair = [&](int k, int j) { return pack16(sums[k][j], sums[k][2 + j]); };
    if (LAYOUT == SWIZZLED) *(uint4*)to = make_uint4(pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1));
    else if (LAYOUT == FRAGMENTS) store8(to, pair(0, 0), pair(0, 1)), store8(to + 16, pair(1, 0), pair(1, 1));
    else store8(to, pair(0, 0), pair(1, 0)), store8(to + 16, pair(0, 1), pair(1, 1));
    to += step;
  }
};

// Chunks of a token on their way, for which there are registers: a divisor of CHUNKS, so that each has its own.
static constexpr int UNDER_WAY = INPUT == PLAIN || CHUNKS <= 4 ? CHUNKS : CHUNKS % 4 == 0 ? 4 : CHUNKS % 3 == 0 ? 3 : CHUNKS;

// A token's columns that a warp rotates.
struct Row {
  const u16* x;
  long long other;  // from x to what it is multiplied by, in SILU
};

struct TokenRotation {
  Sylvester by;
  int first;
  u32 negative[CHUNKS][4];
  uint4 raw[UNDER_WAY], other[INPUT == PLAIN ? 1 : UNDER_WAY];

  __device__ __forceinline__ TokenRotation(int lane) : by(lane), first(first_column(lane)) {}
  // signs: of the block's columns.
  __device__ __forceinline__ void take_signs(const u8* signs) {
    #pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const u32 bits = signs[32 * c + first / 8];
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        negative[c][i] = (bits >> 2 * i & 1) << 15 | (bits >> 2 * i & 2) << 30;
        hold(negative[c][i]);
      }
    }
  }
  __device__ __forceinline__ void request(const Row& row, int chunk) {
    const u16* const from = row.x + first + 256 * chunk;
    load_now(raw[chunk % UNDER_WAY], (const uint4*)from);
    if (INPUT != PLAIN) load_now(other[chunk % UNDER_WAY], (const uint4*)(from + row.other));
  }
  __device__ __forceinline__ void request(const Row& row) {
    #pragma unroll
    for (int c = 0; c < UNDER_WAY; ++c) request(row, c);
  }
  // Two columns, to be rotated.
  __device__ __forceinline__ u32 made(u32 x, u32 by) const {
    if (INPUT == PLAIN) return x;
    return pack16(silu(from16((u16)x)) * from16((u16)by), silu(from16((u16)(x >> 16))) * from16((u16)(by >> 16)));
  }
  // Of the token whose first chunks are there, to columns from `start` on of out [column tiles][held] tokens; next: the one that is requested then.
  __device__ __forceinline__ void rotate(const Row& row, const Row& next, u16* out, int start, int token, int held, int tiles) {
    const float none[4] = {};
    float v[2][4][CHUNKS];  // without KEPT and with it
    #pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const uint4 x = raw[c % UNDER_WAY], y = other[INPUT == PLAIN ? 0 : c % UNDER_WAY];
      const u32 w[4] = {made(x.x, y.x) ^ negative[c][0], made(x.y, y.y) ^ negative[c][1], made(x.z, y.z) ^ negative[c][2], made(x.w, y.w) ^ negative[c][3]};
      #pragma unroll
      for (int h = 0; h < 2; ++h) {
        float d[4];
        mma(d, none, by.first, w[KEPT * h], w[KEPT * h + 3 - KEPT]);
        #pragma unroll
        for (int i = 0; i < 4; ++i) v[h][i][c] = d[i];
      }
      if (c + UNDER_WAY < CHUNKS) request(row, c + UNDER_WAY);
      else request(next, c + UNDER_WAY - CHUNKS);
    }
    #pragma unroll
    for (int i = 0; i < 8; ++i) across<CHUNKS>(v[i / 4][i % 4]);
    // Sums without KEPT and with it; or where it is a bit of a place that the token's number changes, those for the lower place and for the higher one.
    const u32 sign = LAYOUT == FRAGMENTS && token & 2 ? MINUS : 0;
    Columns to(out, start, token, held, tiles);
    #pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      float one[4], sums[2][4];
      second(one, none, v[0], c, 0);
      #pragma unroll
      for (int k = 0; k < 2; ++k) second(sums[k], one, v[1], c, k ? sign ^ MINUS : sign);
      to.put(sums);
    }
  }
  // d = c + the second product of v, whose sign changes.
  __device__ __forceinline__ void second(float* d, const float* c, const float (*v)[CHUNKS], int chunk, u32 sign) const {
    u32 a[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(v[i % 2 * 2 + i / 2][chunk]);
    mma_tf32(d, c, a, by.second[0] ^ sign, by.second[1] ^ sign);
    if (BF16) return;
    #pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(__uint_as_float(a[i]) - __uint_as_float(a[i] & 0xFFFFE000));  // what was cut off, which shows in fp16
    mma_tf32(d, d, a, by.second[0] ^ sign, by.second[1] ^ sign);
  }
};
