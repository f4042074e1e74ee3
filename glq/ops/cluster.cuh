// Blocks that run together and reach each other's shared memory (Hopper). With ptx.cuh and wgmma.cuh.

// To the same place in the shared memory of each of COUNT blocks, where it is counted at the same barrier.
template <int COUNT> __device__ __forceinline__ void copy_to_cluster(void* to, const void* from, u32 bytes, u64* barrier) {
  if (COUNT == 1)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
  else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"((u16)((1 << COUNT) - 1)) : "memory");
}
// At block `rank`'s barrier in the place that `barrier` is in this one's memory.
__device__ __forceinline__ void arrive_in(int rank, u64* barrier) {
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [a]; }"
               ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}
// All threads of a cluster arrive, and may wait for all others to have done so; of memory this orders nothing but barriers that were published.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void await_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The first COUNT threads of a block.
template <int COUNT> __device__ __forceinline__ void sync_warps() { asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory"); }
