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
// One arrival, and `bytes` that come from `from`; all three multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// ---- products ----

// Of rows of 64 values, one after the other, whose chunks of 16 bytes are swizzled; `at` is aligned to 1,024 bytes. k: first column.
__device__ __forceinline__ u64 describe(u32 at, int k) {
  return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (at + 2 * k) >> 4;
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
#if BF16
#define GLQ_TYPES "f32.bf16.bf16"
#else
#define GLQ_TYPES "f32.f16.f16"
#endif
#define GLQ_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
// d [64, TOKENS] += a [64, 16] · b [16, TOKENS]; a in registers, 16 rows a warp, b described.
__device__ __forceinline__ void multiply(float* d, const u32* a, u64 b) {
#if TOKENS == 64
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." GLQ_TYPES
    " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
    " {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
    : GLQ_D8(d, 0), GLQ_D8(d, 8), GLQ_D8(d, 16), GLQ_D8(d, 24)
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." GLQ_TYPES
    " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
    " {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
    : GLQ_D8(d, 0), GLQ_D8(d, 8), GLQ_D8(d, 16), GLQ_D8(d, 24), GLQ_D8(d, 32), GLQ_D8(d, 40), GLQ_D8(d, 48), GLQ_D8(d, 56)
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
