// E8 words of the KV cache (docs/FORMAT.md, "Codecs"), two at a time: word a in the low halves of registers, word b in the high ones.
//
// Nested E8 needs the shortest of y + 2q E8. With u = y - q, w = ||u| - q| is the size of a coordinate of y modulo 2q, and q - |w| that of
// y - q: so one set of sizes tells both cosets' norms, and
//   norm of the second - norm of the first = 2q (4q - sum of |w| + [second odd] 2 min |w| - [first odd] 2 (q - max |w|)).
// How often 2q is taken off is 0 where u < 0, else 1; for y - q 0 where u < 0 or w < 0: the parities that make a coset odd are
// those of sign bits. All numbers are integers that fp16 has, up to the
// product with beta/2. Digits of y come out of their word by OR with 1024, whose last mantissa bit is 1.

// Tables in shared memory, in this order: cuda_tables.py.
struct Tables {
  u16 trits[8192];    // a 13-bit number's low eight base-3 digits, two bits each, lowest first
  u32 betas[2][64];   // nested-4, nested-3: beta/2 of scales i and j, fp16, at 8 j + i
  uint2 halves[512];  // e8-2: half table, fp16
  u32 integer, key, unused[2];   // 1024, 32: from memory, for an instruction has one constant at most that the compiler knows
};
static constexpr int HALVES_AT = 16384 + 512;

constexpr u32 half_bits(double v) {  // of what fp16 has exactly, or rounded up in size
  if (v == 0) return 0;
  const u32 sign = v < 0 ? 0x8000 : 0;
  int exponent = 15;
  for (v = v < 0 ? -v : v; v >= 2; v /= 2) ++exponent;
  for (; v < 1; v *= 2) --exponent;
  const int mantissa = (int)((v - 1) * 1024);
  return sign | (u32)((exponent << 10) + mantissa + (mantissa < (v - 1) * 1024));
}
constexpr u32 both(double v) { return half_bits(v) * 0x10001; }
static constexpr u32 SIGNS = 0x80008000u;

// In threes, for which some GPUs have an instruction.
__device__ __forceinline__ u32 largest_of(const u32* v) {
  return max2(max2(max2(v[3], v[4]), v[5]), max2(max2(max2(max2(v[0], v[1]), v[2]), v[6]), v[7]));
}
__device__ __forceinline__ u32 least_of(const u32* v) {
  return min2(min2(min2(v[3], v[4]), v[5]), min2(min2(min2(min2(v[0], v[1]), v[2]), v[6]), v[7]));
}

template <int BITS> __device__ __forceinline__ void decode_nested(u32* out, u32 a, u32 b, const Tables& tables) {
  static_assert(BITS == 4 || BITS == 3, "nested E8");
  constexpr int Q = BITS == 4 ? 12 : 6, PERIOD = 2 * Q;
  // Digits in nibbles: of even coordinates, of odd ones. (At 3 bits, the highest bit of a nibble is of others.)
  const u32 low = prmt(a, b, 0x5410), high = prmt(a, b, BITS == 4 ? 0x7632 : 0x6521);
  const u32 at_a = (a >> (BITS == 4 ? 15 : 7)) & 0x3FFE, at_b = (b >> (BITS == 4 ? 15 : 7)) & 0x3FFE;
  const u8* const trits = (const u8*)tables.trits;
  const u32 h = prmt(*(const u16*)(trits + at_a), *(const u16*)(trits + at_b), 0x5410);
  u32 even, odd;
  if (BITS == 4) {
    even = choose(0x33333333, low, h << 2);
    odd = choose(0x33333333, low >> 2, h);
  } else {
    u32 l = low & 0x00FF00FF;
    l = (l | l << 4) & 0x0F0F0F0F;
    l = (l | l << 2) & 0x33333333;
    even = choose(0x11111111, l, h << 1);
    odd = choose(0x11111111, l >> 1, h >> 1);
  }
  constexpr u32 DIGIT = (BITS == 4 ? 15 : 7) * 0x10001u;
  const u32 first[4] = {even << 1, odd << 1, even >> 7, odd >> 7};  // digits 0, 1, 4, 5 at bit 1 and 2, 3, 6, 7 at bit 5
  const u32 integer = tables.integer;
  u32 n[8];
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    n[i / 2 * 4 + i % 2] = (first[i] & DIGIT << 1) | integer;      // 1024 + 2 c
    n[i / 2 * 4 + i % 2 + 2] = (first[i] & DIGIT << 5) | integer;  // 1024 + 32 c
  }

  // u, w
  const u32 c7 = fma2(n[7], both(1. / 32), both(-32));
  const u32 base = fma2(n[7], both(1. / 32), both(-32 - Q - 1024)), base_0 = fma2(n[7], both(1. / 32), both(-31 - Q - 1024));
  const u32 base_5 = fma2(n[7], both(1. / 32), both(-32 - Q - 64));
  const u32 u[6] = {add2(n[0], base_0), add2(n[1], base), fma2(n[2], both(1. / 16), base_5), fma2(n[3], both(1. / 16), base_5),
                    add2(n[4], base), add2(n[5], base)};
  u32 w[8];
  #pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = subtract2(abs2(u[i]), both(Q));
  // y6 and a multiple of 4q that makes it positive, by the sum of u, in which everything is but 4 c6 - 5 c7 and a constant
  const u32 sum = add2(add2(add2(u[0], u[1]), add2(u[2], u[3])), add2(u[4], u[5]));
  const u32 c7_more = fma2(n[7], both(1. / 32), both(-32 + (BITS == 4 ? -27 : 9)));
  const u32 y6 = fma2(c7_more, both(-5), fma2(n[6], both(1. / 8), sum));
  const u32 turns = fma2(y6, both(1. / PERIOD), both(1536));  // (1 / PERIOD rounds up: halves do, too)
  w[6] = fma2(add2(turns, both(-1536)), both(-PERIOD), y6);
  w[7] = c7;
  u32 size[8];
  #pragma unroll
  for (int i = 0; i < 8; ++i) size[i] = i == 7 ? w[i] : abs2(w[i]);

  // The coset
  const u32 turned = turns << 15;
  const u32 odd_0 = signs2(u[0] ^ u[1] ^ u[2] ^ u[3] ^ u[4] ^ u[5] ^ turned);
  u32 sign[7];  // of y modulo 2q
  #pragma unroll
  for (int i = 0; i < 7; ++i) sign[i] = i == 6 ? w[6] & SIGNS : w[i] & ~u[i] & SIGNS;
  const u32 odd_1 = odd_0 ^ signs2(sign[0] ^ sign[1] ^ sign[2] ^ sign[3] ^ sign[4] ^ sign[5] ^ sign[6]);
  const u32 largest = largest_of(size);
  const u32 least = least_of(size);
  const u32 total = add2(add2(add2(size[0], size[1]), add2(size[2], size[3])), add2(add2(size[4], size[5]), add2(size[6], size[7])));
  const u32 moves = add2(odd_1 & least, odd_0 & add2(largest, both(-Q)));
  const u32 excess = fma2(moves, both(2), subtract2(both(4 * Q), total));  // of the second's norm
  const u32 second = signs2(excess), is_odd = choose(second, odd_1, odd_0);

  // What is farthest from 0, the first of equals, goes to the other side
  const u32 direction = choose(SIGNS, excess, tables.key);
  u32 key[8];
  #pragma unroll
  for (int i = 0; i < 8; ++i) key[i] = fma2(size[i], direction, both(-i));
  const u32 top = largest_of(key) | ~is_odd;
  const u32 below_top = subtract2(both(1), top);

  const u32 beta_at = (high & 0xE000E000) * 8193 >> 24;
  const u32 beta = *(const u32*)((const u8*)tables.betas[BITS == 4 ? 0 : 1] + beta_at);
  const u32 less = multiply2(beta, both(-Q)) & second, other = multiply2(beta, both(-PERIOD)) ^ (excess & SIGNS);
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 v = fma2(add_within_1(key[i], below_top), other, fma2(size[i], beta, less));
    out[i] = i == 7 ? v : v ^ sign[i];
  }
}

// out[i]: coordinate i of both, in units of their vectors' scales, fp16.
template <int BITS> __device__ __forceinline__ void decode2(u32* out, u32 a, u32 b, const Tables& tables) {
  if constexpr (BITS > 2) decode_nested<BITS>(out, a, b, tables);
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
