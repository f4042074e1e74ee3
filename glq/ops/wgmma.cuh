// Hopper's own instructions (sm_90a): products by warpgroups, bulk copies, barriers in shared memory.
typedef unsigned long long u64;

// ---- barriers ----

__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void await(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Whether it is over.
__device__ __forceinline__ bool has_come(u64* barrier, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  return done;
}
// One arrival; the phase is over when so many bytes have come, too, which may come before.
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// One arrival, and `bytes` that come from `from`; all three multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
  expect(barrier, bytes);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Into the L2 cache; both multiples of 16 bytes.
__device__ __forceinline__ void request_bulk(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// ---- products ----

// Of rows of 64 values, one after the other, whose chunks of 16 bytes are swizzled; `at` is aligned to 1,024 bytes. k: first column.
__device__ __forceinline__ u64 describe(u32 at, int k) {
  const u32 low = (at + 2 * k) / 16 + (1 << 16);  // 32 bits that depend on something
  return (u64)(1 << 30 | 1024 >> 4) << 32 | low;
}
// What threads wrote into shared memory before a barrier that this thread waited for, is there for its products. (Those who
// wrote could do so, too, but would wait for whatever else they have requested from memory.)
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// After a wait: the compiler may not read a sum ahead of it. (It may move what reads a register past instructions that do not name it.)
template <int COUNT> __device__ __forceinline__ void settle(float (&d)[COUNT]) {
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Nor a register that it is to be copied to, which products read, be written ahead of it.
template <int COUNT> __device__ __forceinline__ void settle(u32* d) {
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
#if BF16
#define GLQ_TYPES "f32.bf16.bf16"
#else
#define GLQ_TYPES "f32.f16.f16"
#endif
// TOKENS / 2 sums are operands 0, 1, …; then come a, described or in four registers, and what describes b.
#define GLQ_R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define GLQ_R64 GLQ_R32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define GLQ_R96 GLQ_R64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define GLQ_R128 GLQ_R96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define GLQ_R160 GLQ_R128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define GLQ_R192 GLQ_R160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define GLQ_R224 GLQ_R192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define GLQ_R256 GLQ_R224 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define GLQ_D16(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define GLQ_D32(d, i) GLQ_D16(d, i), GLQ_D16(d, i + 8)
#define GLQ_D64(d, i) GLQ_D32(d, i), GLQ_D32(d, i + 16)
#if TOKENS == 32
#define GLQ_SUMS GLQ_R32
#define GLQ_DESCRIBED "%16, %17"
#define GLQ_FRAGMENT "{%16,%17,%18,%19}, %20"
#define GLQ_D(d) GLQ_D32(d, 0)
#elif TOKENS == 64
#define GLQ_SUMS GLQ_R64
#define GLQ_DESCRIBED "%32, %33"
#define GLQ_FRAGMENT "{%32,%33,%34,%35}, %36"
#define GLQ_D(d) GLQ_D64(d, 0)
#elif TOKENS == 128
#define GLQ_SUMS GLQ_R128
#define GLQ_DESCRIBED "%64, %65"
#define GLQ_FRAGMENT "{%64,%65,%66,%67}, %68"
#define GLQ_D(d) GLQ_D64(d, 0), GLQ_D64(d, 32)
#else
#define GLQ_SUMS GLQ_R256
#define GLQ_DESCRIBED "%128, %129"
#define GLQ_FRAGMENT "{%128,%129,%130,%131}, %132"
#define GLQ_D(d) GLQ_D64(d, 0), GLQ_D64(d, 32), GLQ_D64(d, 64), GLQ_D64(d, 96)
#endif
#define GLQ_TEXT(n) #n
#define GLQ_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" GLQ_TEXT(n) "k16." GLQ_TYPES
// d [64, TOKENS] += a [64, 16] · b [16, TOKENS], both described. d is not to be touched until the product is done.
__device__ __forceinline__ void multiply(float* d, u64 a, u64 b) {
  asm volatile(GLQ_WGMMA(TOKENS) " {" GLQ_SUMS "}, " GLQ_DESCRIBED ", 1, 1, 1, 0, 0;" : GLQ_D(d) : "l"(a), "l"(b));
}
// The same with 16 rows of a in each warp's registers, as mma has them, which are not to be touched either.
__device__ __forceinline__ void multiply(float* d, const u32* a, u64 b) {
  asm volatile(GLQ_WGMMA(TOKENS) " {" GLQ_SUMS "}, " GLQ_FRAGMENT ", 1, 1, 1, 0;"
               : GLQ_D(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- threads ----

// Registers of each thread of a warpgroup, from now on: others leave what some take.
template <int COUNT> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// An 8 × 8 matrix of 16-bit values, of which a lane has two of row lane / 4, transposed.
__device__ __forceinline__ u32 transpose(u32 v) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
