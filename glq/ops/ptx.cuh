// What C++ has no words for: the instructions of NVIDIA GPUs that the kernels use. (tests/emulator has them for a CPU.)
// Macro: BF16, the 16-bit type of x and of the operands of mma.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
  return r;
}
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }  // what a warp has in common
__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {  // one instruction, which the compiler makes two of
  u32 r;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Half of a word by a dot product of its halves, where multiplications are made: shifts, selections and logic go to a unit that is busier.
__device__ __forceinline__ u32 lower16(u32 w) {
  u32 r;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(w), "r"(1), "r"(0));
  return r;
}
__device__ __forceinline__ u32 upper16(u32 w) {
  u32 r;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(w), "r"(256), "r"(0));
  return r;
}

// The compiler shall keep v, instead of making it anew from what it was made of.
template <typename T> __device__ __forceinline__ void hold(T*& v) { asm volatile("" : "+l"(v)); }
__device__ __forceinline__ void hold(u32& v) { asm volatile("" : "+r"(v)); }
// A lane's own, which the assembler shall keep in a register: it makes what comes of a thread's number anew, at 30 cycles.
__device__ __forceinline__ u32 keep(u32 v) { return __shfl_sync(~0u, v, threadIdx.x % 32); }

// ---- memory ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
template <typename T> __device__ __forceinline__ T* in_shared(u32 at) { return (T*)__cvta_shared_to_generic(at); }
__device__ __forceinline__ u32 load_shared(u32 at) { return *(const u32*)__cvta_shared_to_generic(at); }
__device__ __forceinline__ uint2 load_shared8(u32 at) { return *(const uint2*)__cvta_shared_to_generic(at); }
// Not later than what follows.
__device__ __forceinline__ void load_now(u32& v, const u32* p) { asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p)); }
__device__ __forceinline__ void load_now(uint2& v, const uint2* p) { asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); }
__device__ __forceinline__ void load_now(uint4& v, const uint4* p) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
}
// One store, which the compiler makes two of.
__device__ __forceinline__ void store8(void* p, u32 a, u32 b) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b) : "memory"); }
// Codes are read once: they need not stay in a cache.
__device__ __forceinline__ void load4(u32* r, const u8* p) { asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(r[0]) : "l"(p)); }
__device__ __forceinline__ void load8(u32* r, const u8* p) {
  asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}
__device__ __forceinline__ void load16(u32* r, const u8* p) {
  asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
__device__ __forceinline__ void request_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }  // 128 bytes
__device__ __forceinline__ void copy16_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_async() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// What other blocks see at once, word by word.
__device__ __forceinline__ void store_shared_by_gpu(float* p, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ uint4 load_shared_by_gpu(const float* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
// What other GPUs see at once.
__device__ __forceinline__ void store_shared_by_system(uint4* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ uint4 load_shared_by_system(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// ---- numbers ----

__device__ __forceinline__ float from_half(u16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
__device__ __forceinline__ float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
#if BF16
__device__ __forceinline__ float from16(u16 v) { return from_bf16(v); }
__device__ __forceinline__ u16 to16(float v) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#else
__device__ __forceinline__ float from16(u16 v) { return from_half(v); }
__device__ __forceinline__ u16 to16(float v) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#endif
__device__ __forceinline__ u32 pack_half(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ u32 pack16(float low, float high) { return BF16 ? pack_bf16(low, high) : pack_half(low, high); }
// v / (1 + e⁻ᵛ), as exact as fp32 but for the last bits.
__device__ __forceinline__ float silu(float v) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950f * v));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1 + e));
  return v * r;
}
// d [16, 8] = c + a [16, 16] · b [16, 8], each lane with its fragments, in bf16 or fp16.
#define GLQ_MMA(TYPE) \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
__device__ __forceinline__ void mma_bf16(float* d, const float* c, const u32* a, u32 b0, u32 b1) { GLQ_MMA("bf16"); }
__device__ __forceinline__ void mma_half(float* d, const float* c, const u32* a, u32 b0, u32 b1) { GLQ_MMA("f16"); }
#undef GLQ_MMA
// In the type of x; c: d.
__device__ __forceinline__ void mma(float* d, const float* c, const u32* a, u32 b0, u32 b1) { return BF16 ? mma_bf16(d, c, a, b0, b1) : mma_half(d, c, a, b0, b1); }
__device__ __forceinline__ void mma(float* d, const u32* a, u32 b0, u32 b1) { mma(d, d, a, b0, b1); }
__device__ __forceinline__ void mma_bf16(float* d, const u32* a, u32 b0, u32 b1) { mma_bf16(d, d, a, b0, b1); }
// d [16, 8] = c + a [16, 8] · b [8, 8] in tf32: of fp32's bits the first 19 count.
__device__ __forceinline__ void mma_tf32(float* d, const float* c, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- programmatic dependent launch: the next kernel may start, and waits for the one ahead ----

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// What was complete when this kernel began, which does not wait for the one ahead.
__device__ __forceinline__ void see_what_is_complete() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
