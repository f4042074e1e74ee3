// What all kernels that read packed matrices have in common: where shared memory begins, a lane's codes of a tile of docs/FORMAT.md, the rows' scales.
// Macros, besides those of ptx.cuh: CODE_BITS, SCALE (of rows: 16 or 32 bits of IEEE, 0: bf16).

static constexpr int TILE_BYTES = 32 * CODE_BITS;
static constexpr int LANE_REGS = CODE_BITS / 4;  // of a lane's codes in a tile

// Where dynamic shared memory begins, if there is no other: from sm_90 on the driver has what is before. Known to the compiler, it costs
// nothing in the address of an entry. Should a GPU have it elsewhere, everything is NaN, which matmul.try_out sees.
static constexpr u32 TABLE_AT = __CUDA_ARCH__ >= 900 ? 1024 : 0;
__device__ __forceinline__ bool refuses(const u8* memory, u16* out, size_t count) {
  if (shared_address(memory) % (1 << 24) == TABLE_AT) return false;  // above is a block's number in its cluster
  wait_for_previous();
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) out[i] = 0x7FFF;
  return true;
}

// ---- codes ----

// A lane's codes of one tile: pieces of 16, 8 and 4 bytes, the lanes' side by side.
__device__ __forceinline__ void load_codes(u32* r, const u8* tile, int lane) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  #pragma unroll
  for (int i = 0; i < P16; ++i) load16(r + 4 * i, tile + 512 * i + 16 * lane);
  if (P8) load8(r + 4 * P16, tile + 512 * P16 + 8 * lane);
  if (P4) load4(r + LANE_REGS - 1, tile + 32 * (CODE_BITS - 4) + 4 * lane);
}
// The same, where the lane's first piece is at `at`, if they have 16 bytes.
__device__ __forceinline__ void load_codes_at(u32* r, const u8* at, int lane) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  #pragma unroll
  for (int i = 0; i < P16; ++i) load16(r + 4 * i, at + 512 * i);
  if (P8) load8(r + 4 * P16, at + 512 * P16 - 8 * (long long)lane);
  if (P4) load4(r + LANE_REGS - 1, at + 32 * (CODE_BITS - 4) - 12 * (long long)lane);
}
// The pieces of which step s of the product (two words) used the last; r: now those of another tile.
__device__ __forceinline__ void load_used(u32* r, const u8* tile, int lane, int s) {
  constexpr int P16 = CODE_BITS / 16, P8 = CODE_BITS % 16 / 8, P4 = CODE_BITS % 8 / 4;
  const int before = CODE_BITS * 2 * s / 32, done = s == 3 ? LANE_REGS : CODE_BITS * 2 * (s + 1) / 32;  // registers
  #pragma unroll
  for (int i = 0; i < P16; ++i) if (before < 4 * i + 4 && 4 * i + 4 <= done) load16(r + 4 * i, tile + 512 * i + 16 * lane);
  if (P8 && before < 4 * P16 + 2 && 4 * P16 + 2 <= done) load8(r + 4 * P16, tile + 512 * P16 + 8 * lane);
  if (P4 && before < LANE_REGS && LANE_REGS <= done) load4(r + LANE_REGS - 1, tile + 32 * (CODE_BITS - 4) + 4 * lane);
}

// ---- tables ----

// Copies of a table's ENTRIES into shared memory, 16 bytes at a time, PIECES of them an entry, by the first COUNT threads of a block. Entries come from far: the first
// ones are asked for at once, and put later. Lanes that put at the same time, a quarter of a warp, have pieces in different banks.
template <int COUNT, int ENTRIES, int PIECES, typename T> struct TableFiller {
  static constexpr bool EVEN = ENTRIES % COUNT == 0;
  static constexpr int OF_THREAD = (ENTRIES + COUNT - 1) / COUNT, AT_ONCE = OF_THREAD < 4 ? OF_THREAD : 4;
  const T* const from;
  T held[AT_ONCE];

  __device__ __forceinline__ TableFiller(const u32* from) : from((const T*)from) {
    request(0);
    __syncwarp();  // what follows stays behind
  }
  __device__ __forceinline__ void request(int first) {
    #pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = first + i * COUNT + min(threadIdx.x, COUNT - 1);  // without a branch, behind which the assembler would put it
      if (EVEN || at < ENTRIES) load_now(held[i], from + at);
    }
  }
  template <typename Place, typename Piece> __device__ __forceinline__ void put(Place place, Piece piece) {
    const int turn = threadIdx.x * PIECES / 8;
    #pragma unroll
    for (int first = 0; first < ENTRIES; first += AT_ONCE * COUNT) {
      if (first > 0) request(first);
      #pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int at = first + i * COUNT + threadIdx.x;
        if (EVEN || at < ENTRIES)
          #pragma unroll
          for (int j = 0; j < PIECES; ++j) *(uint4*)(place(at) + 16 * ((j + turn) % PIECES)) = piece(held[i]);
      }
    }
  }
};

// ---- scales ----

static constexpr int SCALE_BYTES = SCALE == 32 ? 4 : 2;
// The scales of rows first … first + count − 1 into the L2 cache: who needs them at its end would wait for memory then. By the first `threads` of a block.
__device__ __forceinline__ void request_scales(const void* scale, int first, int count, int threads) {
  const u8* const from = (const u8*)scale + (size_t)first * SCALE_BYTES;
  const int end = count * SCALE_BYTES + (u32)(size_t)from % 128;  // from the line that the first is in
  for (int i = 128 * threadIdx.x; i < end; i += 128 * threads) request_to_l2((const u8*)((size_t)from & ~(size_t)127) + i);
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
