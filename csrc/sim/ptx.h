// The simulator's version of cuda/ptx.cuh, function for function. Each wrapper also notes where it was called.
#pragma once
#include <type_traits>

#include "sim/device.h"
#include "sim/instructions.h"
#include "sim/profile.h"
#include "sim/races.h"

namespace sarathi::ptx {

using sim::Site;

template <typename T = unsigned char>
T* dynamic_smem() { return reinterpret_cast<T*>(sim::self().cta->smem); }
inline uint32_t shared_address(const void* p, Site site = {}) {
  sim::self().site = site;
  return sim::shared_address(p);
}
inline int smid() { return sim::self().cta->sm; }
inline uint64_t globaltimer() { return sim::machine.stats.switches; }

// ---- cp.async ----
inline void cp_async_16(uint32_t smem, const void* gmem, int src_bytes = 16, Site site = {}) {
  sim::cp_async(smem, gmem, 16, src_bytes, site);
}
inline void cp_async_16(void* smem, const void* gmem, int src_bytes = 16, Site site = {}) {
  sim::cp_async(shared_address(smem, site), gmem, 16, src_bytes, site);
}
inline void cp_async_8(uint32_t smem, const void* gmem, int src_bytes = 8, Site site = {}) {
  sim::cp_async(smem, gmem, 8, src_bytes, site);
}
inline void cp_async_4(uint32_t smem, const void* gmem, int src_bytes = 4, Site site = {}) {
  sim::cp_async(smem, gmem, 4, src_bytes, site);
}
inline void cp_async_commit(Site site = {}) { sim::cp_async_commit(site); }
template <int kPendingGroups>
inline void cp_async_wait(Site site = {}) { sim::cp_async_wait(kPendingGroups, site); }
inline void cp_async_wait_all(Site site = {}) { sim::cp_async_wait(-1, site); }

// ---- ldmatrix, mma ----
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem, Site site = {}) { sim::ldmatrix(r, smem, 4, false, site); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem, Site site = {}) {
  sim::ldmatrix(r, shared_address(smem, site), 4, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem, Site site = {}) { sim::ldmatrix(r, smem, 4, true, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem, Site site = {}) {
  sim::ldmatrix(r, shared_address(smem, site), 4, true, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t smem, Site site = {}) { sim::ldmatrix(r, smem, 2, false, site); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem, Site site = {}) {
  sim::ldmatrix(r, shared_address(smem, site), 2, false, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t smem, Site site = {}) { sim::ldmatrix(r, smem, 2, true, site); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem, Site site = {}) {
  sim::ldmatrix(r, shared_address(smem, site), 2, true, site);
}
template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = {}) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "mma_m16n8k16 is for bfloat16 and half");
  sim::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, __nv_bfloat16>, site);
}
template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = {}) {
  mma_m16n8k16<T>(d, a, b[0], b[1], site);
}

// ---- barriers ----
inline void bar_sync(int id, int threads, Site site = {}) { sim::barrier(id, threads, true, site); }
inline void bar_arrive(int id, int threads, Site site = {}) { sim::barrier(id, threads, false, site); }

// ---- shuffles and votes over the whole warp ----
template <typename T>
inline T shfl(T value, int lane, Site site = {}) { return __shfl_sync(0xffffffffu, value, lane, 32, site); }
template <typename T>
inline T shfl_xor(T value, int lane_mask, Site site = {}) { return __shfl_xor_sync(0xffffffffu, value, lane_mask, 32, site); }
template <typename T>
inline T shfl_up(T value, int delta, Site site = {}) { return __shfl_up_sync(0xffffffffu, value, delta, 32, site); }
template <typename T>
inline T shfl_down(T value, int delta, Site site = {}) { return __shfl_down_sync(0xffffffffu, value, delta, 32, site); }
inline uint32_t ballot(bool predicate, Site site = {}) { return __ballot_sync(0xffffffffu, predicate, site); }
inline bool any(bool predicate, Site site = {}) { return __any_sync(0xffffffffu, predicate, site); }
inline bool all(bool predicate, Site site = {}) { return __all_sync(0xffffffffu, predicate, site); }

// ---- memory that several threads touch ----
template <typename T>
inline T atomic_add(T* p, T value, Site site = {}) { return atomicAdd(p, value, site); }
template <typename T>
inline T atomic_add_acq_rel(T* p, T value, Site site = {}) {
  sim::fence_global();
  return atomicAdd(p, value, site);
}
template <typename T>
inline T atomic_max(T* p, T value, Site site = {}) { return atomicMax(p, value, site); }
template <typename T>
inline T atomic_cas(T* p, T compare, T value, Site site = {}) { return atomicCAS(p, compare, value, site); }
inline void red_release_add(int* p, int value, Site site = {}) {
  sim::fence_global();
  atomicAdd(p, value, site);
}

// A thread may be waiting for the value to change: each look lets others run first.
template <typename T>
inline T poll_global(const T* p, const char* what, Site site) {
  sim::enter(site);
  sim::check_generic(p, sizeof(T), false, what);
  sim::poll(what, -1);
  sim::publish_global(const_cast<T*>(p), sizeof(T));
  return *p;
}
template <typename T>
inline void store_strong(T* p, T value, const char* what, Site site) {
  sim::enter(site);
  sim::check_generic(p, sizeof(T), true, what);
  sim::publish_global(p, sizeof(T));
  sim::progress();
  *p = value;
}
template <typename T>
inline T ld_acquire(const T* p, Site site = {}) { return poll_global(p, "ld.acquire", site); }
template <typename T>
inline T ld_volatile(const T* p, Site site = {}) { return poll_global(p, "ld.volatile", site); }
template <typename T>
inline void st_release(T* p, T value, Site site = {}) {
  sim::fence_global();
  store_strong(p, value, "st.release", site);
}
template <typename T>
inline void st_volatile(T* p, T value, Site site = {}) { store_strong(p, value, "st.volatile", site); }

// Plain loads and stores of 4, 8 or 16 bytes, which the simulator can check only when they come through here.
template <typename T>
inline T ld_shared(const T* p, Site site = {}) {
  sim::enter(site);
  sim::machine.stats.shared_load_bytes += sizeof(T);
  const uint32_t address = sim::shared_address(p);
  const auto* from = reinterpret_cast<const T*>(sim::shared_pointer(address, sizeof(T), sizeof(T), "ld.shared"));
  sim::profile_access(sim::Access::kSharedLoad, address, sizeof(T));
  if (auto& races = sim::self().cta->races) races->read(sim::self(), address - sim::kSharedBase, sizeof(T));
  return *from;
}
template <typename T>
inline void st_shared(T* p, T value, Site site = {}) {
  sim::enter(site);
  sim::machine.stats.shared_store_bytes += sizeof(T);
  const uint32_t address = sim::shared_address(p);
  auto* to = reinterpret_cast<T*>(sim::shared_pointer(address, sizeof(T), sizeof(T), "st.shared"));
  sim::profile_access(sim::Access::kSharedStore, address, sizeof(T));
  if (auto& races = sim::self().cta->races) races->write(sim::self(), address - sim::kSharedBase, sizeof(T));
  *to = value;
}
template <typename T>
inline T ld_global(const T* p, Site site = {}) {
  sim::enter(site);
  sim::check_generic(p, sizeof(T), false, "ld.global");
  sim::profile_access(sim::Access::kGlobalLoad, reinterpret_cast<uintptr_t>(p), sizeof(T));
  T value;
  sim::load_global(p, &value, sizeof(T));
  return value;
}
template <typename T>
inline void st_global(T* p, T value, Site site = {}) {
  sim::enter(site);
  sim::check_generic(p, sizeof(T), true, "st.global");
  sim::profile_access(sim::Access::kGlobalStore, reinterpret_cast<uintptr_t>(p), sizeof(T));
  sim::store_global(p, &value, sizeof(T));
}

// ---- arithmetic ----
inline float exp2_approx(float x) {  // ex2.approx.ftz: subnormal results are zero
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_approx(float x) { return std::log2(x); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float rcp_approx(float x) { return 1.0f / x; }

}  // namespace sarathi::ptx
