// The sm_90a half of ptx.cuh: mbarriers, bulk copies by tensor map (TMA), wgmma. One instruction each, no policy; compiled by
// g++ the same names mean the host simulator's versions. mbarriers and tiles are given by shared-window addresses.
#pragma once
#include "cuda/ptx.cuh"

#ifndef __CUDACC__
#include "sim/ptx_sm90.h"
#else

#include <cuda.h>

namespace sarathi::ptx {

#define SARATHI_PTX __device__ __forceinline__

// Values of the wgmma descriptor's layout field: the span within which 16-byte chunks are exchanged.
enum class Swizzle : uint8_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };
enum class Major { kK = 0, kMn = 1 };

// ---- mbarriers: a phase ends when all arrivals and all expected bytes have come; a wait names the parity of the phase ----

SARATHI_PTX void mbarrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes initialised mbarriers visible to the asynchronous proxy; a __syncthreads for the other threads comes after it.
SARATHI_PTX void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SARATHI_PTX void mbarrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
SARATHI_PTX void mbarrier_arrive_expect_tx(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
SARATHI_PTX bool mbarrier_try_wait(uint32_t bar, int parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done != 0;
}
SARATHI_PTX void mbarrier_wait(uint32_t bar, int parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}
// An arrival (counted in the barrier's count) when all cp.async that this thread has issued are there.
SARATHI_PTX void cp_async_mbarrier_arrive(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// What was written to shared memory by plain stores and cp.async becomes visible to TMA and wgmma.
SARATHI_PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- bulk copies; x0 is the innermost coordinate. Elements outside the tensor become zeros, or are not written ----

SARATHI_PTX void tma_load_2d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int x0, int x1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1) : "memory");
}
SARATHI_PTX void tma_load_3d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int x0, int x1, int x2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2) : "memory");
}
SARATHI_PTX void tma_load_4d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int x0, int x1, int x2, int x3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
SARATHI_PTX void tma_store_2d(const CUtensorMap* map, uint32_t smem, int x0, int x1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem), "r"(x0),
      "r"(x1) : "memory");
}
SARATHI_PTX void tma_store_3d(const CUtensorMap* map, uint32_t smem, int x0, int x1, int x2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(smem), "r"(x0),
      "r"(x1), "r"(x2) : "memory");
}
SARATHI_PTX void tma_store_4d(const CUtensorMap* map, uint32_t smem, int x0, int x1, int x2, int x3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(smem),
      "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
SARATHI_PTX void prefetch_tensor_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
SARATHI_PTX void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem), "l"(gmem),
      "r"(bytes), "r"(bar) : "memory");
}
SARATHI_PTX void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPendingGroups>
SARATHI_PTX void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPendingGroups) : "memory"); }
template <int kPendingGroups>
SARATHI_PTX void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPendingGroups) : "memory"); }

// ---- wgmma: d[64, kN] (+)= a[64, 16] b[kN, 16]^T by the four warps of a warpgroup, float32 accumulators ----
// Lane l of warp w holds in d[i] row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2. Registers may not be
// touched between wgmma_fence and the wait for the group.

SARATHI_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SARATHI_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPendingGroups>
SARATHI_PTX void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPendingGroups) : "memory"); }

// Operand in shared memory. K-major with a swizzle: stride = bytes from eight rows to the next eight, leading unused. MN-major
// with a swizzle: leading = bytes from one span of rows to the next, stride = bytes from eight of k to the next eight.
SARATHI_PTX uint64_t matrix_descriptor(uint32_t smem, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle) {
  return (smem & 0x3ffff) >> 4 | static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

#define SARATHI_REGS_4 "%0, %1, %2, %3"
#define SARATHI_REGS_8 SARATHI_REGS_4 ", %4, %5, %6, %7"
#define SARATHI_REGS_16 SARATHI_REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SARATHI_REGS_32 SARATHI_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SARATHI_REGS_48 SARATHI_REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SARATHI_REGS_64 SARATHI_REGS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SARATHI_REGS_96 SARATHI_REGS_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SARATHI_REGS_128 SARATHI_REGS_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SARATHI_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SARATHI_D8(i) SARATHI_D4(i), SARATHI_D4(i + 4)
#define SARATHI_D16(i) SARATHI_D8(i), SARATHI_D8(i + 8)
#define SARATHI_D32(i) SARATHI_D16(i), SARATHI_D16(i + 16)
#define SARATHI_D48(i) SARATHI_D32(i), SARATHI_D16(i + 32)
#define SARATHI_D64(i) SARATHI_D32(i), SARATHI_D32(i + 32)
#define SARATHI_D96(i) SARATHI_D64(i), SARATHI_D32(i + 64)
#define SARATHI_D128(i) SARATHI_D64(i), SARATHI_D64(i + 64)
// The operands after the r registers of d are numbered from r on: a, b, predicate, majors.
#define SARATHI_WGMMA_SS(n, r, type, a_at, b_at, p_at, ma_at, mb_at)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type   \
               " {" SARATHI_REGS_##r "}, %" #a_at ", %" #b_at ", p, 1, 1, %" #ma_at ", %" #mb_at ";\n}"                           \
               : SARATHI_D##r(0)                                                                                                  \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorA)), \
                 "n"(static_cast<int>(kMajorB)))
#define SARATHI_WGMMA_RS(n, r, type, a0, a1, a2, a3, b_at, p_at, mb_at)                                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type   \
               " {" SARATHI_REGS_##r "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_at ", p, 1, 1, %" #mb_at ";\n}"          \
               : SARATHI_D##r(0)                                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
                 "n"(static_cast<int>(kMajorB)))
#define SARATHI_WGMMA_TYPED(form, n, r, ...)                            \
  if constexpr (kN == n) {                                              \
    if constexpr (kIsBfloat16) SARATHI_WGMMA_##form(n, r, "bf16", __VA_ARGS__); \
    else SARATHI_WGMMA_##form(n, r, "f16", __VA_ARGS__);                \
  }

template <int n>
constexpr bool kIsWgmmaWidth = n == 8 || n == 16 || n == 32 || n == 64 || n == 96 || n == 128 || n == 192 || n == 256;

// T = __nv_bfloat16 or __half. kMajor: how the operand lies in shared memory. accumulate = false: d is overwritten.
template <typename T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
SARATHI_PTX void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kIsBfloat16 || std::is_same_v<T, __half>, "wgmma is for bfloat16 and half");
  static_assert(kIsWgmmaWidth<kN>, "no wrapper for this width");
  SARATHI_WGMMA_TYPED(SS, 8, 4, 4, 5, 6, 7, 8)
  SARATHI_WGMMA_TYPED(SS, 16, 8, 8, 9, 10, 11, 12)
  SARATHI_WGMMA_TYPED(SS, 32, 16, 16, 17, 18, 19, 20)
  SARATHI_WGMMA_TYPED(SS, 64, 32, 32, 33, 34, 35, 36)
  SARATHI_WGMMA_TYPED(SS, 96, 48, 48, 49, 50, 51, 52)
  SARATHI_WGMMA_TYPED(SS, 128, 64, 64, 65, 66, 67, 68)
  SARATHI_WGMMA_TYPED(SS, 192, 96, 96, 97, 98, 99, 100)
  SARATHI_WGMMA_TYPED(SS, 256, 128, 128, 129, 130, 131, 132)
}

// The same with a in registers: the fragments of mma_m16n8k16, each warp its 16 rows.
template <typename T, int kN, Major kMajorB = Major::kK>
SARATHI_PTX void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kIsBfloat16 || std::is_same_v<T, __half>, "wgmma is for bfloat16 and half");
  static_assert(kIsWgmmaWidth<kN>, "no wrapper for this width");
  SARATHI_WGMMA_TYPED(RS, 8, 4, 4, 5, 6, 7, 8, 9, 10)
  SARATHI_WGMMA_TYPED(RS, 16, 8, 8, 9, 10, 11, 12, 13, 14)
  SARATHI_WGMMA_TYPED(RS, 32, 16, 16, 17, 18, 19, 20, 21, 22)
  SARATHI_WGMMA_TYPED(RS, 64, 32, 32, 33, 34, 35, 36, 37, 38)
  SARATHI_WGMMA_TYPED(RS, 96, 48, 48, 49, 50, 51, 52, 53, 54)
  SARATHI_WGMMA_TYPED(RS, 128, 64, 64, 65, 66, 67, 68, 69, 70)
  SARATHI_WGMMA_TYPED(RS, 192, 96, 96, 97, 98, 99, 100, 101, 102)
  SARATHI_WGMMA_TYPED(RS, 256, 128, 128, 129, 130, 131, 132, 133, 134)
}

#undef SARATHI_REGS_4
#undef SARATHI_REGS_8
#undef SARATHI_REGS_16
#undef SARATHI_REGS_32
#undef SARATHI_REGS_48
#undef SARATHI_REGS_64
#undef SARATHI_REGS_96
#undef SARATHI_REGS_128
#undef SARATHI_D4
#undef SARATHI_D8
#undef SARATHI_D16
#undef SARATHI_D32
#undef SARATHI_D48
#undef SARATHI_D64
#undef SARATHI_D96
#undef SARATHI_D128
#undef SARATHI_WGMMA_SS
#undef SARATHI_WGMMA_RS
#undef SARATHI_WGMMA_TYPED

// ---- registers of a warpgroup, leaders, dependent launches ----

template <int kRegisters>
SARATHI_PTX void register_alloc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters>
SARATHI_PTX void register_dealloc() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
// True in one lane of the warp, always the same one.
SARATHI_PTX bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}
SARATHI_PTX void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
SARATHI_PTX void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#undef SARATHI_PTX

}  // namespace sarathi::ptx
#endif
