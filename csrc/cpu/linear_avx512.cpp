// out = epilogue(x W^T), tiles of up to 12 rows by 32 outputs held in 24 registers. vpdpbusd (4 int8 products per lane) and
// vdpbf16ps (2 bfloat16 products) both start every cycle on Zen 4: int8 has twice the rate and half the bytes.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "linear.h"

namespace sarathi::cpu::avx512vnni {
namespace {

constexpr int kRows = 12;
static_assert(2 * kRows + 3 <= 32, "accumulators, two weight vectors and a broadcast must fit the registers");

inline __m512 load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline void store_bf16(uint16_t* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// e^x to float rounding: 2^n times a polynomial on |r| <= ln(2) / 2.
inline __m512 exp_ps(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(88.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  constexpr float kTaylor[] = {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
  __m512 p = _mm512_set1_ps(1.f / 720);
  for (float c : kTaylor) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

inline void finish(const LinearParams& p, int64_t row, int32_t block, __m512 y0, __m512 y1) {
  switch (p.epilogue) {
    case Epilogue::kStore: {
      uint16_t* out = static_cast<uint16_t*>(p.out) + row * p.out_stride + block * 32;
      store_bf16(out, y0), store_bf16(out + 16, y1);
      break;
    }
    case Epilogue::kAdd: {
      uint16_t* out = static_cast<uint16_t*>(p.out) + row * p.out_stride + block * 32;
      store_bf16(out, _mm512_add_ps(load_bf16(out), y0)), store_bf16(out + 16, _mm512_add_ps(load_bf16(out + 16), y1));
      break;
    }
    case Epilogue::kSwiGlu: {
      const __m512 one = _mm512_set1_ps(1.f);
      const __m512 silu = _mm512_div_ps(y0, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), y0))));
      store_bf16(static_cast<uint16_t*>(p.out) + row * p.out_stride + block * 16, _mm512_mul_ps(silu, y1));
      break;
    }
    case Epilogue::kFloat: {
      float* out = static_cast<float*>(p.out) + row * p.out_stride + block * 32;
      _mm512_storeu_ps(out, y0), _mm512_storeu_ps(out + 16, y1);
    }
  }
}

struct Int8 {
  using Accumulator = __m512i;
  static constexpr int kDepth = 4, kBytes = 1;
  static Accumulator zero() { return _mm512_setzero_si512(); }
  static Accumulator dot(Accumulator acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static __m512 value(Accumulator acc, const __m512 w_scale, int64_t row, const float* scales, const int32_t* sums) {
    // Weights were stored + 128: take 128 * sum(x) off again.
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, _mm512_set1_epi32(sums[row])));
    return _mm512_mul_ps(_mm512_mul_ps(exact, _mm512_set1_ps(scales[row])), w_scale);
  }
};

struct Bf16 {
  using Accumulator = __m512;
  static constexpr int kDepth = 2, kBytes = 2;
  static Accumulator zero() { return _mm512_setzero_ps(); }
  static Accumulator dot(Accumulator acc, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static __m512 value(Accumulator acc, const __m512, int64_t, const float*, const int32_t*) { return acc; }
};

template <class Type, int kCount>
void tile(const LinearParams& p, int32_t row, int32_t block, const char* values, const float* scales, const int32_t* sums) {
  typename Type::Accumulator acc[kCount][2];
  for (int i = 0; i < kCount; ++i) acc[i][0] = acc[i][1] = Type::zero();
  const int64_t stride = static_cast<int64_t>(p.k) * Type::kBytes;
  const char* x = values + row * stride;
  const uint8_t* w = p.w + static_cast<int64_t>(block) * stride * 32;
  for (int32_t offset = 0; offset < stride; offset += 4, w += 128) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
    _mm_prefetch(reinterpret_cast<const char*>(w) + 1024, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w) + 1088, _MM_HINT_T0);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      int32_t pair;
      std::memcpy(&pair, x + i * stride + offset, sizeof pair);
      const __m512i broadcast = _mm512_set1_epi32(pair);
      acc[i][0] = Type::dot(acc[i][0], w0, broadcast);
      acc[i][1] = Type::dot(acc[i][1], w1, broadcast);
    }
  }
  const __m512 none = _mm512_setzero_ps();
  const __m512 s0 = p.w_scale ? _mm512_loadu_ps(p.w_scale + block * 32) : none;
  const __m512 s1 = p.w_scale ? _mm512_loadu_ps(p.w_scale + block * 32 + 16) : none;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i)
    finish(p, row + i, block, Type::value(acc[i][0], s0, row + i, scales, sums), Type::value(acc[i][1], s1, row + i, scales, sums));
}

using Tile = void (*)(const LinearParams&, int32_t, int32_t, const char*, const float*, const int32_t*);
template <class Type>
constexpr Tile kTiles[kRows] = {tile<Type, 1>, tile<Type, 2>, tile<Type, 3>, tile<Type, 4>,  tile<Type, 5>,  tile<Type, 6>,
                                tile<Type, 7>, tile<Type, 8>, tile<Type, 9>, tile<Type, 10>, tile<Type, 11>, tile<Type, 12>};

template <class Type>
void multiply_as(const LinearParams& p, int32_t row_begin, int32_t row_end, int32_t block_begin, int32_t block_end,
                 const char* values, const float* scales, const int32_t* sums) {
  for (int32_t block = block_begin; block < block_end; ++block) {
    int32_t tiles = (row_end - row_begin + kRows - 1) / kRows;
    for (int32_t row = row_begin; row < row_end; --tiles) {  // rows shared out evenly: 13 are 7 and 6, not 12 and 1
      const int32_t count = (row_end - row + tiles - 1) / tiles;
      kTiles<Type>[count - 1](p, row, block, values, scales, sums);
      row += count;
    }
  }
}

}  // namespace

void prepare(const LinearParams& p, int32_t row_begin, int32_t row_end, char* values, float* scales, int32_t* sums) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint16_t* x = p.x + row * p.x_stride;
    __m512 squares = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
    for (int32_t i = 0; i < p.k; i += 16) {
      __m512 v = load_bf16(x + i);
      squares = _mm512_fmadd_ps(v, v, squares);
      if (p.norm) v = _mm512_mul_ps(v, _mm512_loadu_ps(p.norm + i));
      largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    }
    const float factor = p.norm ? 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(p.k) + p.eps) : 1.f;
    const float top = _mm512_reduce_max_ps(largest);
    const __m512 multiplier = _mm512_set1_ps(!p.w_scale ? factor : top > 0 ? 127.f / top : 0.f);
    __m512i sum = _mm512_setzero_si512();
    for (int32_t i = 0; i < p.k; i += 16) {
      __m512 v = load_bf16(x + i);
      if (p.norm) v = _mm512_mul_ps(v, _mm512_loadu_ps(p.norm + i));
      v = _mm512_mul_ps(v, multiplier);
      if (p.w_scale) {
        const __m512i q = _mm512_cvtps_epi32(v);
        sum = _mm512_add_epi32(sum, q);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + row * p.k + i), _mm512_cvtepi32_epi8(q));
      } else {
        store_bf16(reinterpret_cast<uint16_t*>(values) + row * p.k + i, v);
      }
    }
    scales[row] = top * factor / 127.f;
    sums[row] = 128 * _mm512_reduce_add_epi32(sum);
  }
}

void multiply(const LinearParams& p, int32_t row_begin, int32_t row_end, int32_t block_begin, int32_t block_end,
              const char* values, const float* scales, const int32_t* sums) {
  (p.w_scale ? multiply_as<Int8> : multiply_as<Bf16>)(p, row_begin, row_end, block_begin, block_end, values, scales, sums);
}

}  // namespace sarathi::cpu::avx512vnni
