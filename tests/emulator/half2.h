// What ops/half2.cuh and codecs/device.cuh have for pairs of fp16 numbers. After cuda.h.

template <typename F> static u32 each_half(F f, u32 a, u32 b = 0, u32 c = 0) {
  auto at = [](u32 v, int i) { return from_half((u16)(v >> 16 * i)); };
  return pack_half(f(at(a, 0), at(b, 0), at(c, 0)), f(at(a, 1), at(b, 1), at(c, 1)));
}
static u32 multiply2(u32 a, u32 b) { return each_half([](float x, float y, float) { return x * y; }, a, b); }
static u32 add2(u32 a, u32 b) { return each_half([](float x, float y, float) { return x + y; }, a, b); }
static u32 subtract2(u32 a, u32 b) { return each_half([](float x, float y, float) { return x - y; }, a, b); }
static u32 fma2(u32 a, u32 b, u32 c) { return each_half([](double x, float y, float z) { return (float)(x * y + z); }, a, b, c); }
static u32 fma_within_1(u32 a, u32 b, u32 c) { return each_half([](double x, float y, float z) { return (float)std::fmin(std::fmax(x * y + z, 0.0), 1.0); }, a, b, c); }
static u32 fma2_bf16(u32 a, u32 b, u32 c) {
  auto at = [](u32 v, int i) { return (double)from_bf16((u16)(v >> 16 * i)); };
  return pack_bf16(at(a, 0) * at(b, 0) + at(c, 0), at(a, 1) * at(b, 1) + at(c, 1));
}
static u32 max2(u32 a, u32 b) { return each_half([](float x, float y, float) { return std::fmax(x, y); }, a, b); }
static u32 min2(u32 a, u32 b) { return each_half([](float x, float y, float) { return std::fmin(x, y); }, a, b); }
static u32 abs2(u32 a) { return a & 0x7FFF7FFF; }
static u32 add_within_1(u32 a, u32 b) { return each_half([](float x, float y, float) { return std::fmin(std::fmax(x + y, 0.0f), 1.0f); }, a, b); }
static u32 choose(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }
static u32 signs2(u32 a) { return prmt(a, 0, 0xBB99); }
static bool any_lane(bool v) { return __ballot_sync(~0u, v) != 0; }
static float power_of_2(float v) { return std::exp2(v); }
static float log_2(float v) { return std::log2(v); }
static float reciprocal(float v) { return 1 / v; }
