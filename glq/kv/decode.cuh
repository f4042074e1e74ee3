// Words of the KV cache (glq/kv/shaped.py; at 2 bits docs/FORMAT.md, "Codecs"), two at a time: word a in the low halves of registers, word b in
// the high ones.
//
// A field is a coordinate, so it is taken out of a word by a mask: as a number of fp16 it is a multiple of 2^-24, which one fma makes 2^-9 of it
// and adds what the coordinate begins at. What else a word says is in the lowest bits of its upper fields: three bits of each of the two words
// are an address in a table of pairs of steps, whose gaps hold copies for other lanes, so that they meet in fewer banks.

// Tables in shared memory: cuda_tables.py.
struct Tables {
  u32 steps4[1376], steps3[224];  // of two words, as fp16, in units of 1/512
  uint2 halves[512];              // e8-2: half table, fp16
};
static constexpr int STEPS_AT[2] = {1376 * 4, 0}, HALVES_AT = 1600 * 4;  // 3 bits, 4 bits

// Where coordinates begin, for 3 and 4 bits: in memory, for an instruction has one constant at most that the compiler knows.
#define BEGIN(Q, I) both((-Q / 2 + 0.5 + I / 16.) / 512)
#define BEGINS(Q) {BEGIN(Q, 0), BEGIN(Q, 1), BEGIN(Q, 2), BEGIN(Q, 3), BEGIN(Q, 4), BEGIN(Q, 5), BEGIN(Q, 6), BEGIN(Q, 7)}
__constant__ u32 begins[2][8] = {BEGINS(8), BEGINS(16)};

template <int BITS> __device__ __forceinline__ void decode_shaped(u32* out, u32 a, u32 b, const Tables& tables) {
  static_assert(BITS == 4 || BITS == 3, "E8 shaped by D8");
  constexpr int Q = 1 << BITS, SECOND = BITS == 4 ? 8 : 9;
  constexpr u32 EACH = 1 + (1 << BITS) + (1 << 2 * BITS) + (1 << 3 * BITS);  // the lowest bits of fields
  const u32 low = prmt(a, b, 0x5410), high = BITS == 4 ? prmt(a, b, 0x7632) : prmt(a, b, 0x6521) >> 4;
  const u32 parity = signs2((low & EACH * 0x10001) * (EACH << 15 - 3 * BITS));  // their sum's, at the top field
  const u32 upper = choose(EACH * 0x10001, low ^ parity, high);
  const u32 parts[4] = {low, low >> SECOND, upper, upper >> SECOND};
  u32 x[8];
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int second = i % 4 * BITS >= SECOND, at = i % 4 * BITS - second * SECOND;
    x[i] = fma2(parts[i / 4 * 2 + second] & (Q - 1) * 0x10001 << at, both(32768 >> at), begins[BITS - 3][i]);
  }

  // If the word says so, the largest goes to the other side. Sizes are 1/16 of a step apart, at least.
  u32 size[8];
  #pragma unroll
  for (int i = 0; i < 8; ++i) size[i] = abs2(x[i]);
  const u32 largest = max2(max2(max2(size[0], size[1]), max2(size[2], size[3])), max2(max2(size[4], size[5]), max2(size[6], size[7])));
  const u32 is_odd = signs2(high << 15);
  const u32 below = subtract2(both(1. / 8192), largest | ~is_odd);  // or NaN

  constexpr u32 OF_A = BITS == 4 ? 0x1110 : 0x0248;
  constexpr int DOWN = BITS == 4 ? 18 : 17;
  const int lane = threadIdx.x % 32, copy = BITS == 4 ? (lane & 1) << 3 | (lane & 2) << 4 : (lane & 1) << 4;
  const u32 at = (high & OF_A * 0x10001) * (1 + (1 << DOWN)) >> DOWN;
  const u32 step = *(const u32*)((const u8*)&tables + STEPS_AT[BITS - 3] + copy + at);
  const u32 other = multiply2(step, both(-16 * Q));  // a period, times 8192; within fp16 (STEP_UNIT in shaped.py)
  #pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = fma2(add_within_1(size[i], below), other ^ x[i] & SIGNS, multiply2(x[i], step));
}

// out[i]: coordinate i of both, in units of their vectors' scales, fp16.
template <int BITS> __device__ __forceinline__ void decode2(u32* out, u32 a, u32 b, const Tables& tables) {
  if constexpr (BITS > 2) decode_shaped<BITS>(out, a, b, tables);
  else
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto entry = [&](u32 word) { return tables.halves[half == 0 ? word >> 7 : (word >> 7 & 0x180) | (word & 0x7F)]; };
      const uint2 of_a = entry(a), of_b = entry(b);
      out[4 * half] = prmt(of_a.x, of_b.x, 0x5410);
      out[4 * half + 1] = prmt(of_a.x, of_b.x, 0x7632);
      out[4 * half + 2] = prmt(of_a.y, of_b.y, 0x5410);
      out[4 * half + 3] = prmt(of_a.y, of_b.y, 0x7632);
    }
}
