// Constants of half2.cuh.

constexpr u32 half_bits(double v) {  // of what fp16 has exactly
  const u32 sign = v < 0 ? 0x8000 : 0;
  int exponent = 15;
  for (v = v < 0 ? -v : v; v >= 2; v /= 2) ++exponent;
  for (; v < 1; v *= 2) --exponent;
  return sign | (u32)((exponent << 10) + (int)((v - 1) * 1024));
}
constexpr u32 both(double v) { return half_bits(v) * 0x10001; }
static constexpr u32 SIGNS = 0x80008000u;
