// A CUDA block on one CPU thread: fibers for threads, which change at barriers and at what a warp does together.
// Stands for ops/ptx.cuh and for what nvrtc knows by itself. Blocks run one after the other, or RESIDENT at a time, which take
// turns when all threads of one wait for what others hand over.
#define __device__
#define __global__
#define __constant__ static
#define __forceinline__ inline
#define __align__(n)
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static
#define __CUDA_ARCH__ 900

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y; };
using std::max;
using std::min;

static Index threadIdx, blockIdx, gridDim, blockDim;
alignas(1024) static u8 dynamic_shared[1 << 18];

enum State { READY, AT_BARRIER, IN_WARP, POLLING, DONE };
struct Fiber { ucontext_t context; std::vector<char> stack; State state; };
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static u32 exchange[32][32][8];  // [warp][lane]: what lanes show each other
static std::function<void()> body;

static void pause_as(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}
static bool arrived;  // whether what a thread waited for has come since this was last set back
template <typename F> static void poll(F come) {
  while (!come()) pause_as(POLLING);
  arrived = true;
}
static void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s in block %d, %d\n", what, blockIdx.x, blockIdx.y);
  std::abort();
}
static void __trap() { fail("trap"); }
static void __syncthreads() { pause_as(AT_BARRIER); }
static void sync_warp() { pause_as(IN_WARP); }
static void __syncwarp() { sync_warp(); }

static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static void atomicAdd(int* at, int v) { *at += v; }
static int __popc(u32 v) { return __builtin_popcount(v); }
static float __int_as_float(int v) { float f; std::memcpy(&f, &v, 4); return f; }
static float rsqrtf(float v) { return 1 / std::sqrt(v); }
static u32 __funnelshift_r(u32 lo, u32 hi, int s) { return (u32)(((uint64_t)hi << 32 | lo) >> (s & 31)); }
static float __uint_as_float(u32 u) { float f; std::memcpy(&f, &u, 4); return f; }
static u32 __umulhi(u32 a, u32 b) { return (u32)((unsigned long long)a * b >> 32); }
static u32 __float_as_uint(float f) { u32 u; std::memcpy(&u, &f, 4); return u; }
static u32 __shfl_sync(u32, u32 v, int from) {
  auto& shown = exchange[current / 32];
  shown[current % 32][0] = v;
  sync_warp();
  const u32 r = shown[from & 31][0];
  sync_warp();
  return r;
}
// f(what lane l shows) for every lane l, as bits.
template <typename F> static u32 ask_lanes(u32 v, F f) {
  auto& shown = exchange[current / 32];
  shown[current % 32][0] = v;
  sync_warp();
  u32 r = 0;
  for (int l = 0; l < 32; ++l) r |= (u32)f(shown[l][0]) << l;
  sync_warp();
  return r;
}
static u32 __ballot_sync(u32, bool v) { return ask_lanes(v, [](u32 other) { return other != 0; }); }
static u32 __match_any_sync(u32, u32 v) { return ask_lanes(v, [v](u32 other) { return other == v; }); }
static u32 __reduce_min_sync(u32, u32 v) {
  auto& shown = exchange[current / 32];
  shown[current % 32][0] = v;
  sync_warp();
  for (int l = 0; l < 32; ++l) v = min(v, shown[l][0]);
  sync_warp();
  return v;
}
static u32 __shfl_up_sync(u32 mask, u32 v, int d) { return __shfl_sync(mask, v, max(current % 32 - d, 0)); }
template <typename T> static T __shfl_xor_sync(u32 mask, T v, int m) {  // T: of 4 bytes
  u32 bits;
  std::memcpy(&bits, &v, 4);
  bits = __shfl_sync(mask, bits, current % 32 ^ m);
  std::memcpy(&v, &bits, 4);
  return v;
}
template <typename T> static T __ldg(const T* p) { return *p; }
template <typename T> static T __ldcg(const T* p) { return *p; }

// ---- ops/ptx.cuh ----

static u32 prmt(u32 a, u32 b, u32 s) {
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 byte = ((uint64_t)b << 32 | a) >> 8 * (s >> 4 * i & 7) & 255;
    r |= (s >> 4 * i & 8 ? byte >> 7 ? 255 : 0 : byte) << 8 * i;
  }
  return r;
}
static u32 __byte_perm(u32 a, u32 b, u32 s) { return prmt(a, b, s); }
static int uniform(int v) { return v; }
static u32 keep(u32 v) { return v; }
static u32 multiply_add(u32 a, u32 b, u32 c) { return a * b + c; }
static u32 shared_address(const void* p) { return (u32)((const u8*)p - dynamic_shared); }
template <typename T> static T* in_shared(u32 at) { return (T*)(dynamic_shared + at); }
template <typename T> static void hold(T&) {}
static u32 load_shared(u32 at) {
  if (at % 4 || at >= sizeof dynamic_shared) fail("shared load out of place");
  return *(u32*)(dynamic_shared + at);
}
static uint2 load_shared8(u32 at) {
  if (at % 8) fail("shared load out of place");
  return {load_shared(at), load_shared(at + 4)};
}
static void load4(u32* r, const u8* p) { std::memcpy(r, p, 4); }
static void load8(u32* r, const u8* p) { std::memcpy(r, p, 8); }
static void load16(u32* r, const u8* p) { std::memcpy(r, p, 16); }
static void request_to_l2(const void*) {}
static void copy16_async(void* to, const void* from) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("copy of 16 bytes out of place");
  std::memcpy(to, from, 16);
}
static void store_shared_by_gpu(float* p, u32 a, u32 b, u32 c, u32 d) {
  const u32 words[4] = {a, b, c, d};
  if ((uintptr_t)p % 16) fail("store of 16 bytes out of place");
  std::memcpy(p, words, 16);
}
static uint4 load_shared_by_gpu(const float* p) {
  uint4 v;
  poll([&] {
    std::memcpy(&v, p, 16);
    return v.x != ~0u && v.y != ~0u && v.z != ~0u && v.w != ~0u;
  });
  return v;
}
// Other ranks are other threads of this process.
static void store_shared_by_system(uint4* p, uint4 v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  if ((uintptr_t)p % 16) fail("store of 16 bytes out of place");
  for (int i = 0; i < 4; ++i) __atomic_store_n((u32*)p + i, words[i], __ATOMIC_RELAXED);
}
static uint4 load_shared_by_system(const uint4* p) {
  u32 words[4];
  for (int i = 0; i < 4; ++i)
    while ((words[i] = __atomic_load_n((const u32*)p + i, __ATOMIC_RELAXED)) == ~0u) sched_yield();
  return {words[0], words[1], words[2], words[3]};
}
template <typename T> static void load_now(T& v, const T* p) { v = *p; }
static void store8(void* p, u32 a, u32 b) {
  const u32 words[2] = {a, b};
  if ((uintptr_t)p % 8) fail("store of 8 bytes out of place");
  std::memcpy(p, words, 8);
}
static void commit_async() {}
static void wait_async() {}
static u32 lower16(u32 w) { return w & 0xFFFF; }
static u32 upper16(u32 w) { return w >> 16; }
static void let_next_start() {}
static void wait_for_previous() {}
static void see_what_is_complete() {}
static float from_half(u16 v) { _Float16 h; std::memcpy(&h, &v, 2); return (float)h; }
static float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
static u16 to_half(float v) { const _Float16 h = (_Float16)v; u16 r; std::memcpy(&r, &h, 2); return r; }
static u16 to_bf16(float v) { const u32 u = __float_as_uint(v); return (u16)((u + 0x7FFF + (u >> 16 & 1)) >> 16); }
#if BF16
static float from16(u16 v) { return from_bf16(v); }
static u16 to16(float v) { return to_bf16(v); }
#else
static float from16(u16 v) { return from_half(v); }
static u16 to16(float v) { return to_half(v); }
#endif
static float silu(float v) { return v / (1 + std::exp(-v)); }
static u32 pack_half(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
static u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
static u32 pack16(float low, float high) { return to16(low) | (u32)to16(high) << 16; }
// d = c + a · b, fragments as the PTX manual draws them for m16n8k16 or, in tf32, m16n8k8.
template <int K, typename From> static void multiply_fragments(float* d, const float* c, const u32* a, u32 b0, u32 b1, From from) {
  const int lane = current % 32;
  auto& shown = exchange[current / 32];
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::copy(mine, mine + 6, shown[lane]);
  sync_warp();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, col = 2 * (lane % 4) + e % 2;
    float sum = c[e];
    for (int k = 0; k < K; ++k) {
      const int half = k / (K / 2), of_lane = k % (K / 2) / (K / 8), low = k % (K / 8);
      sum += from(shown[row % 8 * 4 + of_lane][row / 8 + 2 * half], low) * from(shown[col * 4 + of_lane][4 + half], low);
    }
    d[e] = sum;
  }
  sync_warp();
}
static void mma(float* d, const float* c, const u32* a, u32 b0, u32 b1) {
  multiply_fragments<16>(d, c, a, b0, b1, [](u32 v, int i) { return from16((u16)(v >> 16 * i)); });
}
static void mma(float* d, const u32* a, u32 b0, u32 b1) { mma(d, d, a, b0, b1); }
static void mma_bf16(float* d, const u32* a, u32 b0, u32 b1) {
  multiply_fragments<16>(d, d, a, b0, b1, [](u32 v, int i) { return from_bf16((u16)(v >> 16 * i)); });
}
static void mma_tf32(float* d, const float* c, const u32* a, u32 b0, u32 b1) {
  multiply_fragments<8>(d, c, a, b0, b1, [](u32 v, int) { return __uint_as_float(v & 0xFFFFE000); });
}

// Products run as late as they may: what they read and write too early or too late shows.
struct Product { float* d; unsigned long long a, b; const u32* fragments[4]; };  // fragments of a: those of the lanes with these rows
typedef std::vector<std::vector<std::vector<Product>>> Products;  // of each thread: groups, of which the last one is open
static Products products(1024);

// ---- blocks that have begun ----

struct Block {
  Index index;
  std::vector<Fiber> fibers;
  std::vector<u8> shared, shown;  // while others run
  Products products = Products(1024);
};
static std::vector<std::unique_ptr<Block>> resident;

// ---- ops/wgmma.cuh ----

typedef unsigned long long u64;
struct Barrier { u32 arrivals : 12, missing : 12, phase : 8; int bytes; };  // bytes: that are still to come
static void init_barrier(u64* b, int arrivals) { *(Barrier*)b = {(u32)arrivals, (u32)arrivals, 0, 0}; }
static void publish_barriers() {}
static void count_in(u64* at, int arrivals, int bytes) {
  Barrier& b = *(Barrier*)at;
  b.missing -= arrivals, b.bytes += bytes;
  if (b.missing == 0 && b.bytes == 0) b.missing = b.arrivals, ++b.phase;
}
static void arrive(u64* b) { count_in(b, 1, 0); }
static void expect(u64* b, u32 bytes) { count_in(b, 1, (int)bytes); }
static void await(u64* b, u32 parity) {
  poll([=] { return (((volatile Barrier*)b)->phase & 1) != parity; });
}
static bool has_come(u64* b, u32 parity) { return (((volatile Barrier*)b)->phase & 1) != parity; }
static void request_bulk(const void* from, u32 bytes) {
  if ((uintptr_t)from % 16 || bytes % 16) fail("bulk request out of place");
}
static void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("bulk copy out of place");
  std::memcpy(to, from, bytes);
  arrive(barrier);
}
static u64 describe(u32 at, int k) {
  if (at % 1024) fail("operand that is not aligned to 1,024 bytes");
  return (u64)at << 32 | (u32)k;
}
static u32 transpose(u32 v) {
  auto& shown = exchange[current / 32];
  const int lane = current % 32, row = lane / 4, col = lane % 4 * 2;
  shown[lane][0] = v;
  sync_warp();
  u32 r = 0;
  for (int i = 0; i < 2; ++i) r |= (shown[(col + i) * 4 + row / 2][0] >> 16 * (row % 2) & 0xFFFF) << 16 * i;
  sync_warp();
  return r;
}
static u32 transpose8x8(u32 v) { return transpose(v); }
template <int> static void take_registers() {}
template <int> static void leave_registers() {}
static u32* block_counter() { return (u32*)(dynamic_shared + sizeof dynamic_shared - 4); }
static void show_to_products() {}
static void begin_products() { products[current].emplace_back(); }
static void commit_products() {}
#ifdef TOKENS
static void multiply(float* d, u64 a, u64 b) { products[current].back().push_back({d, a, b}); }
static void multiply(float* d, const u32* a, u64 b) {
  auto& shown = exchange[current / 32];
  const u64 mine = (u64)a;
  std::memcpy(shown[current % 32], &mine, 8);
  sync_warp();
  Product p{d, 0, b};
  for (int t = 0; t < 4; ++t) std::memcpy(p.fragments + t, shown[current % 32 / 4 * 4 + t], 8);
  sync_warp();
  products[current].back().push_back(p);
}
static float operand(u64 described, int row, int k) {
  const u32 at = row * 128 + ((u32)described + k) * 2;
  return from16(*(u16*)(dynamic_shared + (described >> 32) + (at ^ (at >> 7 & 7) << 4)));
}
static void run_product(const Product& p) {
  const int lane = current % 32, first = current % 128 / 32 * 16;
  for (int i = 0; i < TOKENS / 2; ++i) {
    const int row = first + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float a = p.fragments[0] ? from16((u16)(p.fragments[k % 8 / 2][i / 2 % 2 + k / 8 * 2] >> 16 * (k % 2))) : operand(p.a, row, k);
      p.d[i] += a * operand(p.b, col, k);
    }
  }
}
template <typename T, int COUNT> static void settle(T (&)[COUNT]) {}
template <int COUNT> static void settle(u32*) {}
template <int PENDING> static void await_products() {
  auto& groups = products[current];
  sync_warp();  // all lanes have what their products read, until all products are done
  for (; groups.size() > PENDING; groups.erase(groups.begin()))
    for (const Product& p : std::vector<Product>(groups[0])) run_product(p);
  sync_warp();
}
#endif

// ---- the scheduler ----

#ifndef RESIDENT
#define RESIDENT 1
#endif

static void run_fiber() {
  body();
  fibers[current].state = DONE;
}
static void begin_block(int threads) {
  fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.stack.resize(1 << 16);
    f.state = READY;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &scheduler;
    makecontext(&f.context, run_fiber, 0);
  }
  std::memset(dynamic_shared, 0xFF, sizeof dynamic_shared);  // NaN
  *block_counter() = 0;
}
// Let every thread go as far as it gets; then release the warps that are complete, or the block. Whether it came to its end: else
// it waits for other blocks. progress: whether anything was done.
static bool run_block(int threads, bool& progress) {
  auto count = [&](int from, int to, State s) {
    return std::count_if(fibers.begin() + from, fibers.begin() + to, [s](const Fiber& f) { return f.state == s; });
  };
  auto release = [&](int from, int to) { for (int i = from; i < to; ++i) fibers[i].state = READY; };
  for (;;) {
    bool moved = arrived = false;
    for (current = 0; current < threads; ++current) {
      const State before = fibers[current].state;
      if (before != READY && before != POLLING) continue;
      threadIdx = {current, 0};
      swapcontext(&scheduler, &fibers[current].context);
      moved |= arrived || fibers[current].state != POLLING || before != POLLING;
    }
    for (int w = 0; w < threads; w += 32)
      if (count(w, w + 32, IN_WARP) == 32) release(w, w + 32), moved = true;
    progress |= moved;
    if (count(0, threads, DONE) == threads) return true;
    if (!moved && count(0, threads, AT_BARRIER) == threads) release(0, threads), moved = true;
    if (!moved && count(0, threads, POLLING) > 0) return false;
    if (!moved) fail("threads wait for others that never come");
  }
}
static void rest(Block& block) {
  block.fibers.swap(fibers);
  block.products.swap(products);
  block.shared.assign(dynamic_shared, dynamic_shared + sizeof dynamic_shared);
  block.shown.assign((u8*)exchange, (u8*)exchange + sizeof exchange);
}
static void wake(Block& block) {
  fibers.swap(block.fibers);
  products.swap(block.products);
  std::copy(block.shared.begin(), block.shared.end(), dynamic_shared);
  std::copy(block.shown.begin(), block.shown.end(), (u8*)exchange);
}
static void run_grid(int columns, int rows, int threads, std::function<void()> kernel) {
  gridDim = {columns, rows};
  blockDim = {threads, 1};
  body = kernel;
  for (int started = 0; started < columns * rows || !resident.empty();) {
    bool progress = false;
    while (started < columns * rows && (int)resident.size() < RESIDENT) {
      resident.push_back(std::make_unique<Block>(Block{{started % columns, started / columns}}));
      blockIdx = resident.back()->index;
      begin_block(threads);
      rest(*resident.back());
      ++started, progress = true;
    }
    for (auto& block : resident) {
      blockIdx = block->index;
      wake(*block);
      if (run_block(threads, progress)) block.reset();
      else rest(*block);
    }
    resident.erase(std::remove(resident.begin(), resident.end(), nullptr), resident.end());
    if (!progress) fail("wait for what no block before it hands over");
  }
}
