// The simulator's version of cuda/ptx_sm90.cuh, function for function.
#pragma once
#include "sim/hopper.h"
#include "sim/ptx.h"

namespace sarathi::ptx {

using sim::Swizzle;
enum class Major { kK = 0, kMn = 1 };

// ---- mbarriers ----
inline void mbarrier_init(uint32_t bar, int count, Site site = {}) { sim::mbarrier_init(bar, count, site); }
inline void mbarrier_fence_init(Site site = {}) { sim::mbarrier_fence_init(site); }
inline void mbarrier_arrive(uint32_t bar, Site site = {}) { sim::mbarrier_arrive(bar, 0, site); }
inline void mbarrier_arrive_expect_tx(uint32_t bar, int bytes, Site site = {}) { sim::mbarrier_arrive(bar, bytes, site); }
inline bool mbarrier_try_wait(uint32_t bar, int parity, Site site = {}) { return sim::mbarrier_test(bar, parity, site); }
inline void mbarrier_wait(uint32_t bar, int parity, Site site = {}) { sim::mbarrier_wait(bar, parity, site); }
inline void cp_async_mbarrier_arrive(uint32_t bar, Site site = {}) { sim::cp_async_mbarrier_arrive(bar, site); }
inline void fence_proxy_async(Site site = {}) { sim::fence_proxy_async(site); }

// ---- bulk copies ----
inline void tma_load_2d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int x0, int x1, Site site = {}) {
  sim::tma_load(smem, map, bar, {x0, x1}, site);
}
inline void tma_load_3d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int x0, int x1, int x2, Site site = {}) {
  sim::tma_load(smem, map, bar, {x0, x1, x2}, site);
}
inline void tma_load_4d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int x0, int x1, int x2, int x3, Site site = {}) {
  sim::tma_load(smem, map, bar, {x0, x1, x2, x3}, site);
}
inline void tma_store_2d(const CUtensorMap* map, uint32_t smem, int x0, int x1, Site site = {}) {
  sim::tma_store(map, smem, {x0, x1}, site);
}
inline void tma_store_3d(const CUtensorMap* map, uint32_t smem, int x0, int x1, int x2, Site site = {}) {
  sim::tma_store(map, smem, {x0, x1, x2}, site);
}
inline void tma_store_4d(const CUtensorMap* map, uint32_t smem, int x0, int x1, int x2, int x3, Site site = {}) {
  sim::tma_store(map, smem, {x0, x1, x2, x3}, site);
}
inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t bar, Site site = {}) {
  sim::bulk_load(smem, gmem, bytes, bar, site);
}
inline void bulk_commit(Site site = {}) { sim::bulk_commit(site); }
template <int kPendingGroups>
inline void bulk_wait(Site site = {}) { sim::bulk_wait(kPendingGroups, site); }
template <int kPendingGroups>
inline void bulk_wait_read(Site site = {}) { sim::bulk_wait(kPendingGroups, site); }

// ---- wgmma ----
inline void wgmma_fence(Site site = {}) { sim::wgmma_fence(site); }
inline void wgmma_commit(Site site = {}) { sim::wgmma_commit(site); }
template <int kPendingGroups>
inline void wgmma_wait(Site site = {}) { sim::wgmma_wait(kPendingGroups, site); }

template <typename T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
inline void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, Site site = {}) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256 && (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>));
  sim::wgmma({{}, {}, a, b, kN, false, kMajorA == Major::kMn, kMajorB == Major::kMn, std::is_same_v<T, __nv_bfloat16>,
      accumulate, false, site}, d, nullptr, site);
}
template <typename T, int kN, Major kMajorB = Major::kK>
inline void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = {}) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256 && (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>));
  sim::wgmma({{}, {}, 0, b, kN, true, false, kMajorB == Major::kMn, std::is_same_v<T, __nv_bfloat16>, accumulate, false, site},
      d, a, site);
}
inline uint64_t matrix_descriptor(uint32_t smem, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle) {
  return (smem & 0x3ffff) >> 4 | static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// ---- registers, leaders, dependent launches ----
template <int kRegisters>
inline void register_alloc(Site site = {}) { sim::set_registers(kRegisters, true, site); }
template <int kRegisters>
inline void register_dealloc(Site site = {}) { sim::set_registers(kRegisters, false, site); }
inline bool elect_one(Site site = {}) { return sim::elect(site); }
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

}  // namespace sarathi::ptx
