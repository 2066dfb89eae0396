// The words of CUDA C++ that our kernels use, for g++: qualifiers, vector types, 16-bit floats, arithmetic intrinsics.
// No CUDA toolkit is needed. Everything with a meaning across threads is in device.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace sarathi::sim {

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float float_from_bfloat16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t bfloat16_from_float(float value) {  // to nearest, ties to even; NaN becomes the canonical 0x7fff
  const auto bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float float_from_half(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  // Scaling by 2^112 moves the exponent bias and normalises subnormals; infinity and NaN get their exponent by hand.
  float value = bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) value = bit_cast<float>(0x7f800000u | (magnitude & 0x3ffu) << 13);
  return bit_cast<float>(bit_cast<uint32_t>(value) | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

inline uint16_t half_from_float(float value) {  // to nearest, ties to even; NaN becomes the canonical 0x7fff
  const auto bits = bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u)                          // subnormal: let the float adder do the rounding
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u);
  return sign | static_cast<uint16_t>((magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13);
}

}  // namespace sarathi::sim

struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;

inline float __bfloat162float(__nv_bfloat16 v) { return sarathi::sim::float_from_bfloat16(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {sarathi::sim::bfloat16_from_float(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __half2float(__half v) { return sarathi::sim::float_from_half(v.bits); }
inline __half __float2half_rn(float v) { return {sarathi::sim::half_from_float(v)}; }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

inline float __int_as_float(int v) { return sarathi::sim::bit_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return sarathi::sim::bit_cast<float>(v); }
inline int __float_as_int(float v) { return sarathi::sim::bit_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return sarathi::sim::bit_cast<unsigned>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
template <typename T>
inline T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
