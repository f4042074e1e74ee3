// How a warp decodes a tile of a trellis code straight into mma fragments.
// Macros, besides those of ptx.cuh: CODE_BITS, TABLE_BITS, SIGNED (a table of signed pairs), COPIES of it in shared memory, SCALE (of rows: 16 or 32 bits
// of IEEE, 0: bf16).

static constexpr int REGS = CODE_BITS / 4;  // of a lane's codes in a tile
static constexpr int TILE_BYTES = 32 * CODE_BITS;
static constexpr u32 STRIDE = 4 * COPIES;  // bytes from one table entry to the next

// ---- the table, in shared memory ----

// Where dynamic shared memory begins, if there is no other: from sm_90 on the driver has what is before. Known to the compiler, it costs
// nothing in the address of an entry. Should a GPU have it elsewhere, everything is NaN, which matmul.try_out sees.
static constexpr u32 TABLE_AT = __CUDA_ARCH__ >= 900 ? 1024 : 0;
__device__ __forceinline__ bool refuses(const u8* memory, u16* out, size_t count) {
  if (shared_address(memory) % (1 << 24) == TABLE_AT) return false;  // above is a block's number in its cluster
  wait_for_previous();
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) out[i] = 0x7FFF;
  return true;
}
// Signs beside the entry: both are the top bits of the hash's low half, which is shifted to where STRIDE is, if that is above.
static constexpr u32 UNSHIFTED = 1 << (16 - TABLE_BITS), LOW = STRIDE > UNSHIFTED ? STRIDE : UNSHIFTED;
// Signs apart: entries are bits 17, 16 and 14 … 7. They are an address as they are, if there is room for the holes that bit
// 15 leaves.
static constexpr bool SPREAD = !SIGNED && COPIES == 32;
static constexpr u32 HOLE = 1 << 15, TABLE_BYTES = SPREAD ? 7 * HOLE : STRIDE << TABLE_BITS;
static constexpr u32 HASH = 0x9E3779B1u * (SIGNED ? LOW / UNSHIFTED : 0xFFFF0001u);  // s · 65537 · 0xFFFF0001 = s mod 2^32

// Where the copies of an entry begin that a hash has.
__device__ __forceinline__ u32 place_of(u32 h) {
  if (SIGNED) {
    const u32 entry = h & ((1u << TABLE_BITS) - 1) * LOW;
    return LOW > STRIDE ? entry / (LOW / STRIDE) : entry;
  }
  return SPREAD ? h & 0x37F80 : (h & 0x7F80 | h >> 1 & 0x18000) / (128 / STRIDE);
}
__device__ __forceinline__ u32 hash(u32 state) { return state * HASH; }
// The pair of a state, which is as state_of gives it. copy: of the table, in bytes.
__device__ __forceinline__ u32 value(u32 state, u32 copy) {
  const u32 h = hash(state), pair = load_shared((place_of(h) | copy) + TABLE_AT);
  return SIGNED ? pair : pair ^ (h & 0x80008000u);
}
__device__ __forceinline__ u32 own_copy() { return 4 * (threadIdx.x % COPIES); }
// By the whole block, which has `threads` of them: a warp writes all copies of 32 entries, 16 bytes a lane.
__device__ __forceinline__ void fill_table(u8* memory, const u32* from, int threads) {
  constexpr int PIECES = COPIES / 4;  // of an entry
  const int lane = threadIdx.x % 32;
  #pragma unroll 2
  for (int e = threadIdx.x; e < 1 << TABLE_BITS; e += threads) {
    const u32 entry = from[e];
    #pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int piece = 32 * i + lane, at = e - lane + piece / PIECES;
      const u32 v = __shfl_sync(~0u, entry, piece / PIECES);
      *(uint4*)(memory + (at + (SPREAD ? at / 256 * 256 : 0)) * STRIDE + 16 * (piece % PIECES)) = make_uint4(v, v, v, v);
    }
  }
}

// ---- codes ----

// A lane's codes of one tile: pieces of 16, 8 and 4 bytes, the lanes' side by side.
__device__ __forceinline__ void load_codes(u32* r, const u8* tile, int lane) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  #pragma unroll
  for (int i = 0; i < P16; ++i) load16(r + 4 * i, tile + 512 * i + 16 * lane);
  if (P8) load8(r + 4 * P16, tile + 512 * P16 + 8 * lane);
  if (P4) load4(r + REGS - 1, tile + 32 * (CODE_BITS - 4) + 4 * lane);
}
// The pieces of which step s of the product (two words) used the last; r: now those of another tile.
__device__ __forceinline__ void load_used(u32* r, const u8* tile, int lane, int s) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  const int before = CODE_BITS * 2 * s / 32, done = s == 3 ? REGS : CODE_BITS * 2 * (s + 1) / 32;  // registers
  #pragma unroll
  for (int i = 0; i < P16; ++i) if (before < 4 * i + 4 && 4 * i + 4 <= done) load16(r + 4 * i, tile + 512 * i + 16 * lane);
  if (P8 && before < 4 * P16 + 2 && 4 * P16 + 2 <= done) load8(r + 4 * P16, tile + 512 * P16 + 8 * lane);
  if (P4 && before < REGS && REGS <= done) load4(r + REGS - 1, tile + 32 * (CODE_BITS - 4) + 4 * lane);
}
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
// The state of register e of the fragment of rows 16m … 16m + 15 in step s: in the low half, and where its signs lie apart
// in the high half, too.
__device__ __forceinline__ u32 state_of(const u32* r, const u32* ends, int s, int m, int e) {
  const int at = CODE_BITS * (2 * m + e % 2) / 8, over = at - (CODE_BITS - 16);
  if (SIGNED) return over <= 0 ? bits16(r, CODE_BITS * (2 * s + e / 2) + at) : ends[e / 2] >> over;
  if (over <= 0) return twice(r, CODE_BITS * (2 * s + e / 2) + at);
  if (over == 8) return prmt(ends[e / 2], ends[e / 2], 0x2121);
  const u32 w = ends[e / 2] >> over;
  return prmt(w, w, 0x1010);
}
static constexpr int SCALE_BYTES = SCALE == 32 ? 4 : 2;
// The scales of rows first … first + count − 1 into the L2 cache: who needs them at its end would wait for memory then. By the threads of a block.
__device__ __forceinline__ void request_scales(const void* scale, int first, int count) {
  const u8* const from = (const u8*)scale + (size_t)first * SCALE_BYTES;
  const int end = count * SCALE_BYTES + (u32)(size_t)from % 128;  // from the line that the first is in
  for (int i = 128 * threadIdx.x; i < end; i += 128 * blockDim.x) request_to_l2((const u8*)((size_t)from & ~(size_t)127) + i);
}
// A row's scale.
__device__ __forceinline__ float load_scale(const void* p, int i) {
#if SCALE == 32
  return ((const float*)p)[i];
#elif SCALE == 16
  return from_half(((const u16*)p)[i]);
#else
  return from_bf16(((const u16*)p)[i]);
#endif
}
