// Thin wrappers around the PTX instructions that our kernels use: one instruction each, no policy. Compiled by g++ the
// same names mean the host simulator's versions (csrc/sim), so a kernel written on these runs without a GPU.
//
// Shared memory is addressed by a 32-bit address in the shared window (shared_address) or by a pointer into it. All of
// it is dynamic: one struct at dynamic_smem(). Warp-wide functions must be reached by all 32 lanes together.
#pragma once

#ifndef __CUDACC__
#include "sim/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sarathi::ptx {

#define SARATHI_PTX __device__ __forceinline__

template <typename T = unsigned char>
SARATHI_PTX T* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char sarathi_dynamic_smem[];
  return reinterpret_cast<T*>(sarathi_dynamic_smem);
}
SARATHI_PTX uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
SARATHI_PTX int smid() {
  int id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return id;
}
SARATHI_PTX uint64_t globaltimer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// ---- cp.async: of `src_bytes` bytes, the rest of the destination becomes zero; src_bytes = 0 reads nothing ----

SARATHI_PTX void cp_async_16(uint32_t smem, const void* gmem, int src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(src_bytes) : "memory");
}
SARATHI_PTX void cp_async_16(void* smem, const void* gmem, int src_bytes = 16) {
  cp_async_16(shared_address(smem), gmem, src_bytes);
}
SARATHI_PTX void cp_async_8(uint32_t smem, const void* gmem, int src_bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem), "l"(gmem), "r"(src_bytes) : "memory");
}
SARATHI_PTX void cp_async_4(uint32_t smem, const void* gmem, int src_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(gmem), "r"(src_bytes) : "memory");
}
SARATHI_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPendingGroups>
SARATHI_PTX void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory"); }
SARATHI_PTX void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- ldmatrix: 8x8 matrices of 16-bit elements; lanes 8i .. 8i+7 address the rows of matrix i ----

SARATHI_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem) : "memory");
}
SARATHI_PTX void ldmatrix_x4(uint32_t (&r)[4], const void* smem) { ldmatrix_x4(r, shared_address(smem)); }
SARATHI_PTX void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem) : "memory");
}
SARATHI_PTX void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) { ldmatrix_x4_trans(r, shared_address(smem)); }
SARATHI_PTX void ldmatrix_x2(uint32_t (&r)[2], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(smem) : "memory");
}
SARATHI_PTX void ldmatrix_x2(uint32_t (&r)[2], const void* smem) { ldmatrix_x2(r, shared_address(smem)); }
SARATHI_PTX void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(smem) : "memory");
}
SARATHI_PTX void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem) { ldmatrix_x2_trans(r, shared_address(smem)); }

// ---- mma: d[16, 8] += a[16, 16] b[16, 8], T = __nv_bfloat16 or __half, float32 accumulators ----

template <typename T>
SARATHI_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "mma_m16n8k16 is for bfloat16 and half");
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <typename T>
SARATHI_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<T>(d, a, b[0], b[1]);
}

// ---- named barriers: `threads` is a multiple of 32 and the same at every arrival; id 0 is __syncthreads ----

SARATHI_PTX void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
SARATHI_PTX void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- shuffles and votes over the whole warp ----

template <typename T>
SARATHI_PTX T shfl(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <typename T>
SARATHI_PTX T shfl_xor(T value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
template <typename T>
SARATHI_PTX T shfl_up(T value, int delta) { return __shfl_up_sync(0xffffffffu, value, delta); }
template <typename T>
SARATHI_PTX T shfl_down(T value, int delta) { return __shfl_down_sync(0xffffffffu, value, delta); }
SARATHI_PTX uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
SARATHI_PTX bool any(bool predicate) { return __any_sync(0xffffffffu, predicate); }
SARATHI_PTX bool all(bool predicate) { return __all_sync(0xffffffffu, predicate); }

// ---- memory that several threads touch: relaxed atomics, and loads and stores with gpu-scope order; T of 4 bytes ----

template <typename T>
SARATHI_PTX T atomic_add(T* p, T value) { return atomicAdd(p, value); }
template <typename T>
SARATHI_PTX T atomic_max(T* p, T value) { return atomicMax(p, value); }
template <typename T>
SARATHI_PTX T atomic_cas(T* p, T compare, T value) { return atomicCAS(p, compare, value); }
SARATHI_PTX int atomic_add_acq_rel(int* p, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}
SARATHI_PTX void red_release_add(int* p, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
template <typename T>
SARATHI_PTX T ld_acquire(const T* p) {
  static_assert(sizeof(T) == 4, "ld_acquire is for 4 bytes");
  T value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
template <typename T>
SARATHI_PTX void st_release(T* p, T value) {
  static_assert(sizeof(T) == 4, "st_release is for 4 bytes");
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
template <typename T>
SARATHI_PTX T ld_volatile(const T* p) { return *static_cast<const volatile T*>(p); }
template <typename T>
SARATHI_PTX void st_volatile(T* p, T value) { *static_cast<volatile T*>(p) = value; }

// Plain loads and stores. On the GPU they are what `*p` is; the simulator sees an access only when it comes through
// here, so kernels use these for everything that one thread writes and another reads.
template <typename T>
SARATHI_PTX T ld_shared(const T* p) { return *p; }
template <typename T>
SARATHI_PTX void st_shared(T* p, T value) { *p = value; }
template <typename T>
SARATHI_PTX T ld_global(const T* p) { return *p; }
template <typename T>
SARATHI_PTX void st_global(T* p, T value) { *p = value; }

// ---- arithmetic with the error of the special function unit (about 2 ulp; tanh: 2^-11 relative) ----

SARATHI_PTX float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SARATHI_PTX float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SARATHI_PTX float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SARATHI_PTX float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#undef SARATHI_PTX

}  // namespace sarathi::ptx
#endif
