// How a warp decodes a tile of a trellis code straight into mma fragments.
// Macros, besides those of codes.cuh: TABLE_BITS, SIGNS (that a table's pairs have: 2, 1 or 0), COPIES of it in shared memory.

static constexpr int TALL = 1, REGS = LANE_REGS;  // tiles of docs/FORMAT.md that 64 rows of 64 columns are, and registers of a lane's codes of these
static constexpr u32 STRIDE = 4 * COPIES;  // bytes from one table entry to the next

// ---- the table, in shared memory ----

static constexpr int ENTRIES = 1 << TABLE_BITS;
// Both signs in the table: an entry is the top bits of the hash's low half, which is shifted to where STRIDE is, if that is above.
static constexpr u32 UNSHIFTED = 1 << (16 - TABLE_BITS), LOW = STRIDE > UNSHIFTED ? STRIDE : UNSHIFTED;
// Otherwise entries are bits 17, 16 and 14 … 7. They are an address as they are, if there is room for the holes that bit 15, a sign, leaves.
static constexpr bool SPREAD = SIGNS < 2 && COPIES == 32;
static constexpr u32 HOLE = 1 << 15, TABLE_BYTES = SPREAD ? 7 * HOLE : STRIDE * ENTRIES;
// With no sign in the table all 32 bits of a hash count, so there may be nothing above a state, or the state itself: s · 65537 · 0xFFFF0001 = s mod 2^32.
static constexpr bool MASKED = SIGNS == 0;
static constexpr u32 HASH = 0x9E3779B1u * (SIGNS == 2 ? LOW / UNSHIFTED : SIGNS == 1 ? 4 : 1), HASH_OF_TWO = HASH * 0xFFFF0001u;
static constexpr u32 APART = SIGNS == 2 ? 0 : SIGNS == 1 ? 0x8000 : 0x80008000;  // of a hash: signs that the table lacks

// Where the copies of an entry begin that a hash has.
__device__ __forceinline__ u32 place_of(u32 h) {
  if (SIGNS == 2) {
    const u32 entry = h & (ENTRIES - 1) * LOW;
    return LOW > STRIDE ? entry / (LOW / STRIDE) : entry;
  }
  return SPREAD ? h & 0x37F80 : (h & 0x7F80 | h >> 1 & 0x18000) / (128 / STRIDE);
}
// The pair that a hash says. copy: of the table, in bytes.
__device__ __forceinline__ u32 value(u32 hash, u32 copy) {
  const u32 pair = load_shared((place_of(hash) | copy) + TABLE_AT);
  return pair ^ (hash & APART);
}
__device__ __forceinline__ u32 own_copy() { return 4 * (threadIdx.x % COPIES); }
static_assert(COPIES >= 4, "16 bytes are four copies");
template <int COUNT> struct Filler : TableFiller<COUNT, ENTRIES, COPIES / 4, u32> {
  using TableFiller<COUNT, ENTRIES, COPIES / 4, u32>::TableFiller;

  __device__ __forceinline__ void fill(u8* memory) {
    this->put([&](int entry) { return memory + (entry + (SPREAD ? entry / 256 * 256 : 0)) * STRIDE; }, [](u32 v) { return make_uint4(v, v, v, v); });
  }
};

// ---- codes ----

// Bits `at` … at + 15 of a lane's string, low; what lies above is not masked unless MASKED.
__device__ __forceinline__ u32 bits16(const u32* r, int at) {
  const int i = at / 32, shift = at % 32;
  if (!MASKED) return shift == 0 ? r[i] : shift <= 16 ? r[i] >> shift : __funnelshift_r(r[i], r[i + 1], shift);
  return shift == 0 ? lower16(r[i]) : shift <= 16 ? upper16(r[i] << 16 - shift) : lower16(__funnelshift_r(r[i], r[i + 1], shift));
}
#ifndef SHARED_BY
#define SHARED_BY 1  // warps that decode a word, each a part
#endif
// Whether words begin with a register, and states are halves of one, or of what lies across two.
static constexpr bool HALVES = CODE_BITS == 64 || CODE_BITS == 32 && SHARED_BY == 1;
// Of words 2s and 2s + 1: the last 16 bits, and the first 16 of the word after it in the strip, which another lane has. With HALVES that word alone.
__device__ __forceinline__ void ends_of(u32* ends, const u32* r, int s) {
  #pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int begin = CODE_BITS * (2 * s + i), last = begin + CODE_BITS - 16;
    const u32 next = __shfl_sync(~0u, HALVES ? r[begin / 32] : bits16(r, begin), threadIdx.x + 4);
    ends[i] = HALVES ? next : last % 32 == 16 ? prmt(r[last / 32], next, 0x5432) : prmt(bits16(r, last), next, 0x5410);
  }
}
// Of the state of register e of the fragment of rows 16m … 16m + 15 in step s. Units of the GPU take turns, where there is a choice.
__device__ __forceinline__ u32 hash_of(const u32* r, const u32* ends, int s, int m, int e) {
  const int word = CODE_BITS * (2 * s + e / 2), at = CODE_BITS * (2 * m + e % 2) / 8, over = at - (CODE_BITS - 16);
  if (!HALVES) return HASH * (over <= 0 ? bits16(r, word + at) : bits16(ends + e / 2, over));
  const u32 own = r[(word + at) / 32], next = at < CODE_BITS - 32 ? r[(word + at) / 32 + 1] : ends[e / 2];
  if (CODE_BITS == 64 && at % 16) return HASH_OF_TWO * prmt(own, next, at % 32 == 8 ? 0x2121 : 0x4343);
  const u32 w = __funnelshift_r(own, next, at % 16);
  return HASH * (at % 32 >= 16 ? upper16(w) : MASKED ? lower16(w) : w);
}
// The fragment of rows 16m … 16m + 15 in step s. held: what ends_of gave.
static constexpr int OF_STEP = 2;
__device__ __forceinline__ void begin_step(u32* held, const u32* r, int s) { ends_of(held, r, s); }
__device__ __forceinline__ void fragment(u32* a, u32* held, const u32* r, int s, int m, u32 copy) {
  #pragma unroll
  for (int e = 0; e < 4; ++e) a[e] = value(hash_of(r, held, s, m, e), copy);
}
// How codes are loaded: as codes.cuh has it.
struct Loader {
  __device__ __forceinline__ Loader(const u8*, int, int) {}
  __device__ __forceinline__ void load(u32* r, const u8* tile, int lane) const { load_codes(r, tile, lane); }
  __device__ __forceinline__ void load_used(u32* r, const u8* tile, int lane, int s) const { ::load_used(r, tile, lane, s); }
};
