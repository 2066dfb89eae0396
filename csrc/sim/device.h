// CUDA's built-in variables and functions that concern more than one thread, for g++. Names and meaning are CUDA's.
#pragma once
#include "sim/machine.h"
#include "sim/memory.h"

#define threadIdx (::sarathi::sim::self().thread_idx)
#define blockIdx (::sarathi::sim::self().cta->block_idx)
#define blockDim (::sarathi::sim::machine.config.block)
#define gridDim (::sarathi::sim::machine.config.grid)

inline constexpr int warpSize = 32;

namespace sarathi::sim {

template <typename T>
struct ShuffleOperand { T value, result; uint32_t source; };

// Each lane names the lane it reads; a lane outside the mask gives nothing (undefined in CUDA, an error here).
template <typename T>
T shuffle(const char* name, uint32_t mask, T value, uint32_t source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  ShuffleOperand<T> operand{value, value, source};
  warp_collective(name, mask, &operand, [](Warp&, uint32_t lanes, void* const* operands) {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      auto* mine = static_cast<ShuffleOperand<T>*>(operands[__builtin_ctz(rest)]);
      if (!(lanes >> mine->source & 1)) fail("divergence", "a shuffle reads lane " + std::to_string(mine->source) +
          ", which is not in its mask");
      mine->result = static_cast<ShuffleOperand<T>*>(operands[mine->source])->value;
    }
  }, site);
  return operand.result;
}

// The lane that shfl.{up,down,xor,idx} reads in segments of `width` lanes; its own when that is outside its segment.
inline uint32_t shuffle_up(int delta, int width) {
  const int lane = self().lane;
  return lane % width - delta < 0 ? lane : lane - delta;
}
inline uint32_t shuffle_down(int delta, int width) {
  const int lane = self().lane;
  return lane % width + delta >= width ? lane : lane + delta;
}
inline uint32_t shuffle_xor(int lane_mask, int width) {
  const int lane = self().lane, other = lane ^ lane_mask;
  return other / width > lane / width ? lane : other;
}

inline uint32_t vote(uint32_t mask, bool predicate, Site site) {
  struct Operand { bool predicate; uint32_t ballot; } operand{predicate, 0};
  warp_collective("vote", mask, &operand, [](Warp&, uint32_t lanes, void* const* operands) {
    uint32_t ballot = 0;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
      ballot |= static_cast<uint32_t>(static_cast<Operand*>(operands[__builtin_ctz(rest)])->predicate) << __builtin_ctz(rest);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
      static_cast<Operand*>(operands[__builtin_ctz(rest)])->ballot = ballot;
  }, site);
  return operand.ballot;
}

// Fibers are switched at wrapper calls only, so reading, changing and writing back is atomic.
template <typename T, typename Change>
T atomic(T* address, Change change, Site site, const char* what) {
  enter(site);
  check_generic(address, sizeof(T), true, what);
  publish_global(address, sizeof(T));
  ++machine.stats.atomics;
  const T old = *address;
  const T changed = change(old);
  if (std::memcmp(&changed, &old, sizeof(T)) != 0) progress();
  *address = changed;
  return old;
}

}  // namespace sarathi::sim

inline void __syncthreads(sarathi::sim::Site site = {}) { sarathi::sim::barrier(0, 0, true, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, sarathi::sim::Site site = {}) {
  sarathi::sim::warp_collective("__syncwarp", mask, nullptr, sarathi::sim::sync_warp, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, sarathi::sim::Site site = {}) {
  const int own = sarathi::sim::self().lane;
  return sarathi::sim::shuffle("shfl", mask, value, own / width * width + (lane & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, sarathi::sim::Site site = {}) {
  return sarathi::sim::shuffle("shfl.xor", mask, value, sarathi::sim::shuffle_xor(lane_mask, width), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, sarathi::sim::Site site = {}) {
  return sarathi::sim::shuffle("shfl.up", mask, value, sarathi::sim::shuffle_up(static_cast<int>(delta), width), site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, sarathi::sim::Site site = {}) {
  return sarathi::sim::shuffle("shfl.down", mask, value, sarathi::sim::shuffle_down(static_cast<int>(delta), width), site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, sarathi::sim::Site site = {}) {
  return sarathi::sim::vote(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, sarathi::sim::Site site = {}) {
  return sarathi::sim::vote(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, sarathi::sim::Site site = {}) {
  return sarathi::sim::vote(mask, predicate == 0, site) == 0;
}

template <typename T>
T atomicAdd(T* address, T value, sarathi::sim::Site site = {}) {
  return sarathi::sim::atomic(address, [&](T old) { return static_cast<T>(old + value); }, site, "atomicAdd");
}
template <typename T>
T atomicMax(T* address, T value, sarathi::sim::Site site = {}) {
  return sarathi::sim::atomic(address, [&](T old) { return old < value ? value : old; }, site, "atomicMax");
}
template <typename T>
T atomicExch(T* address, T value, sarathi::sim::Site site = {}) {
  return sarathi::sim::atomic(address, [&](T) { return value; }, site, "atomicExch");
}
template <typename T>
T atomicCAS(T* address, T compare, T value, sarathi::sim::Site site = {}) {
  const T old = sarathi::sim::atomic(address, [&](T seen) { return seen == compare ? value : seen; }, site, "atomicCAS");
  if (old != compare) sarathi::sim::poll("atomicCAS", -1);
  return old;
}

inline void __threadfence(sarathi::sim::Site site = {}) {
  sarathi::sim::enter(site);
  sarathi::sim::fence_global();
}
inline void __threadfence_block(sarathi::sim::Site site = {}) { sarathi::sim::enter(site); }
inline void __nanosleep(unsigned, sarathi::sim::Site site = {}) {
  sarathi::sim::enter(site);
  sarathi::sim::poll("nanosleep", -1);
}
