// 16-bit floats in registers: two to a word, the first in the low half, as mma and 16-byte stores want them.
#pragma once
#include <type_traits>

#include "ptx.cuh"

namespace sarathi {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<Element, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    static_assert(std::is_same_v<Element, float16>);
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <typename Element>
__device__ __forceinline__ Element from_float(float x) {
  if constexpr (std::is_same_v<Element, float>) return x;
  else if constexpr (std::is_same_v<Element, bfloat16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// Neighbours in memory that one load or store moves.
template <typename Element, int kWidth>
struct alignas(kWidth * sizeof(Element)) Group { Element x[kWidth]; };

}  // namespace sarathi
