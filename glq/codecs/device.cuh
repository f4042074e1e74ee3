// What the search of the trellis asks of a GPU and C++ has no words for. (tests/emulator has it for a CPU.)
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

__device__ __forceinline__ void wait_for_previous() {  // the kernel ahead, beside which this one may have started
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- pairs of fp16 numbers ----

__device__ __forceinline__ u32 subtract2(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 min2(u32 a, u32 b) {
  u32 r;
  asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ u32 pack_half(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// ---- clusters of blocks (sm_90 and up): barriers in shared memory that count the bytes which other blocks send ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 address_in(int rank, const void* p) {  // of what another block of the cluster has in this place
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
  return r;
}
__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival; the phase is over when so many bytes have come, too, which may come before.
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void await(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// Into the shared memory of block `rank`, to the place that `to` is in this one's, and count it at the barrier there.
__device__ __forceinline__ void send4(int rank, void* to, u32 v, u64* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               ::"r"(address_in(rank, to)), "r"(v), "r"(address_in(rank, barrier)) : "memory");
}
__device__ __forceinline__ void send16(int rank, void* to, const u32* v, u64* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];"
               ::"r"(address_in(rank, to)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(address_in(rank, barrier)) : "memory");
}
// The same, not counted.
__device__ __forceinline__ void store_in(int rank, void* to, u32 v) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address_in(rank, to)), "r"(v) : "memory");
}
// All threads of the cluster; each sees what the others wrote before, into global memory, too.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
