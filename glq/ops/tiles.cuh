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
// With no sign in the table all 32 bits of a hash count, so a state is in both halves: s · 65537 · 0xFFFF0001 = s mod 2^32.
static constexpr bool TWICE = SIGNS == 0;
static constexpr u32 HASH = 0x9E3779B1u * (SIGNS == 2 ? LOW / UNSHIFTED : SIGNS == 1 ? 4 : 0xFFFF0001u);
static constexpr u32 APART = SIGNS == 2 ? 0 : SIGNS == 1 ? 0x8000 : 0x80008000;  // of a hash: signs that the table lacks

// Where the copies of an entry begin that a hash has.
__device__ __forceinline__ u32 place_of(u32 h) {
  if (SIGNS == 2) {
    const u32 entry = h & (ENTRIES - 1) * LOW;
    return LOW > STRIDE ? entry / (LOW / STRIDE) : entry;
  }
  return SPREAD ? h & 0x37F80 : (h & 0x7F80 | h >> 1 & 0x18000) / (128 / STRIDE);
}
__device__ __forceinline__ u32 hash(u32 state) { return state * HASH; }
// The pair of a state, which is as state_of gives it. copy: of the table, in bytes.
__device__ __forceinline__ u32 value(u32 state, u32 copy) {
  const u32 h = hash(state), pair = load_shared((place_of(h) | copy) + TABLE_AT);
  return pair ^ (h & APART);
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

// Bits `at` … at + 15 of a lane's string, low; what lies above is not masked.
__device__ __forceinline__ u32 bits16(const u32* r, int at) {
  const int i = at / 32, shift = at % 32;
  return shift == 0 ? r[i] : shift <= 16 ? r[i] >> shift : __funnelshift_r(r[i], r[i + 1], shift);
}
// The same in both halves.
__device__ __forceinline__ u32 twice(const u32* r, int at) {
  const int i = at / 32, byte = at % 32 / 8;
  if (at % 8 == 0) return prmt(r[i], byte == 3 ? r[i + 1] : r[i], 0x1010u + 0x1111u * byte);
  const u32 w = bits16(r, at);
  return prmt(w, w, 0x1010);
}
// Of words 2s and 2s + 1: the last 16 bits, and the first 16 of the word after it in the strip, which another lane has.
__device__ __forceinline__ void ends_of(u32* ends, const u32* r, int s) {
  #pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int begin = CODE_BITS * (2 * s + i), last = begin + CODE_BITS - 16;
    const u32 next = __shfl_sync(~0u, bits16(r, begin), threadIdx.x + 4);
    ends[i] = last % 32 == 16 ? prmt(r[last / 32], next, 0x5432) : prmt(bits16(r, last), next, 0x5410);
  }
}
// The state of register e of the fragment of rows 16m … 16m + 15 in step s: in the low half, and in the high half, too, if TWICE.
__device__ __forceinline__ u32 state_of(const u32* r, const u32* ends, int s, int m, int e) {
  const int at = CODE_BITS * (2 * m + e % 2) / 8, over = at - (CODE_BITS - 16);
  if (!TWICE) return over <= 0 ? bits16(r, CODE_BITS * (2 * s + e / 2) + at) : ends[e / 2] >> over;
  if (over <= 0) return twice(r, CODE_BITS * (2 * s + e / 2) + at);
  if (over == 8) return prmt(ends[e / 2], ends[e / 2], 0x2121);
  const u32 w = ends[e / 2] >> over;
  return prmt(w, w, 0x1010);
}
// The fragment of rows 16m … 16m + 15 in step s. held: what ends_of gave.
static constexpr int OF_STEP = 2;
__device__ __forceinline__ void begin_step(u32* held, const u32* r, int s) { ends_of(held, r, s); }
__device__ __forceinline__ void fragment(u32* a, u32* held, const u32* r, int s, int m, u32 copy) {
  #pragma unroll
  for (int e = 0; e < 4; ++e) a[e] = value(state_of(r, held, s, m, e), copy);
}
// How codes are loaded: as codes.cuh has it.
struct Loader {
  __device__ __forceinline__ Loader(const u8*, int, int) {}
  __device__ __forceinline__ void load(u32* r, const u8* tile, int lane) const { load_codes(r, tile, lane); }
  __device__ __forceinline__ void load_used(u32* r, const u8* tile, int lane, int s) const { ::load_used(r, tile, lane, s); }
};
