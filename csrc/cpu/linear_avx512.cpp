// out = epilogue(x W^T), tiles of up to 12 rows by 32 outputs held in 24 registers. vpdpbusd (4 int8 products per lane) and
// vdpbf16ps (2 bfloat16 products) both start every cycle on Zen 4: int8 has twice the rate and half the bytes.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "linear.h"

namespace sarathi::cpu::avx512vnni {
namespace {

constexpr int kRows = 12;
constexpr int64_t kStreamAhead = 4096;  // bytes of weights asked for early where each is used once
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
  static __m512 value(Accumulator acc, const __m512 w_scale, const Panel& panel, int32_t row) {
    // Weights were stored + 128: take 128 * sum(x) off again.
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, _mm512_set1_epi32(panel.sums[row])));
    return _mm512_mul_ps(_mm512_mul_ps(exact, _mm512_set1_ps(panel.scales[row])), w_scale);
  }
};

struct Bf16 {
  using Accumulator = __m512;
  static constexpr int kDepth = 2, kBytes = 2;
  static Accumulator zero() { return _mm512_setzero_ps(); }
  static Accumulator dot(Accumulator acc, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static __m512 value(Accumulator acc, const __m512, const Panel&, int32_t) { return acc; }
};

// Rows [row, row + kCount) by one block of outputs. Each step also asks for `ahead`: weights that come later.
template <class Type, int kCount, _mm_hint kHint>
void tile(const LinearParams& p, const Panel& panel, int32_t row, int32_t block, const char* ahead, int32_t ahead_step) {
  typename Type::Accumulator acc[kCount][2];
  for (int i = 0; i < kCount; ++i) acc[i][0] = acc[i][1] = Type::zero();
  const int64_t bytes = static_cast<int64_t>(p.k) * Type::kBytes, stride = panel.row_bytes;
  const char* x = panel.values + row * stride;
  const uint8_t* w = p.w + block * bytes * 32;
  for (int32_t offset = 0; offset < bytes; offset += 4, w += 128, ahead += ahead_step) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
    _mm_prefetch(ahead, kHint);
    _mm_prefetch(ahead + 64, kHint);
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
    finish(p, row + i, block, Type::value(acc[i][0], s0, panel, row + i), Type::value(acc[i][1], s1, panel, row + i));
}

using Tile = void (*)(const LinearParams&, const Panel&, int32_t, int32_t, const char*, int32_t);
template <class Type, _mm_hint kHint>
constexpr Tile kTiles[kRows] = {tile<Type, 1, kHint>, tile<Type, 2, kHint>, tile<Type, 3, kHint>,  tile<Type, 4, kHint>,
                                tile<Type, 5, kHint>, tile<Type, 6, kHint>, tile<Type, 7, kHint>,  tile<Type, 8, kHint>,
                                tile<Type, 9, kHint>, tile<Type, 10, kHint>, tile<Type, 11, kHint>, tile<Type, 12, kHint>};

template <class Type>
void multiply_as(const LinearParams& p, const Panel& panel, int32_t row_begin, int32_t row_end, int32_t block) {
  const int32_t rows = row_end - row_begin, tiles = (rows + kRows - 1) / kRows;
  const int64_t bytes = static_cast<int64_t>(p.k) * Type::kBytes * 32;
  const char* w = reinterpret_cast<const char*>(p.w) + block * bytes;
  if (tiles == 1) return kTiles<Type, _MM_HINT_T1>[rows - 1](p, panel, row_begin, block, w + kStreamAhead, 128);
  for (int32_t row = row_begin, left = tiles; left > 0; --left) {  // rows shared out evenly: 13 are 7 and 6, not 12 and 1
    const int32_t count = (row_end - row + left - 1) / left;
    kTiles<Type, _MM_HINT_T0>[count - 1](p, panel, row, block, w + bytes + bytes * (tiles - left) / tiles, 128 / tiles);
    row += count;
  }
}

}  // namespace

size_t scratch_bytes(const LinearParams& p) {
  return p.rows * (static_cast<size_t>(p.k) * (p.w_scale ? 1 : 2) + sizeof(float) + sizeof(int32_t)) + 64;
}

Panel panel_of(const LinearParams& p, char* scratch) {
  if (!p.w_scale && !p.norm) return {reinterpret_cast<const char*>(p.x), 2 * p.x_stride, nullptr, nullptr, true};
  const int64_t row_bytes = static_cast<int64_t>(p.k) * (p.w_scale ? 1 : 2);
  float* scales = reinterpret_cast<float*>(scratch + p.rows * row_bytes);
  return {scratch, row_bytes, scales, reinterpret_cast<int32_t*>(scales + p.rows), false};
}

void prepare(const LinearParams& p, const Panel& panel, int32_t row_begin, int32_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint16_t* x = p.x + row * p.x_stride;
    char* values = const_cast<char*>(panel.values) + row * panel.row_bytes;
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
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), _mm512_cvtepi32_epi8(q));
      } else {
        store_bf16(reinterpret_cast<uint16_t*>(values) + i, v);
      }
    }
    panel.scales[row] = top * factor / 127.f;
    panel.sums[row] = 128 * _mm512_reduce_add_epi32(sum);
  }
}

void multiply(const LinearParams& p, const Panel& panel, int32_t row_begin, int32_t row_end, int32_t block) {
  (p.w_scale ? multiply_as<Int8> : multiply_as<Bf16>)(p, panel, row_begin, row_end, block);
}

}  // namespace sarathi::cpu::avx512vnni
