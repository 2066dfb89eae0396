// The vector operations that the CPU kernels are written in, once per ISA. Everything has internal linkage: a kernel object
// compiled for AVX-512 must not define a weak symbol that the linker could then use in the generic path.
//
//   F          kLanes floats                                  Fma        a compute type: float x float -> float
//   load_as    T -> F, for T = float, Bf16, Half, int8_t      Bf16Dot    two bfloat16 products per lane (AVX512_BF16)
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SARATHI_INLINE inline __attribute__((always_inline))

namespace sarathi {
namespace {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <class T> SARATHI_INLINE T min_of(T a, T b) { return b < a ? b : a; }
template <class T> SARATHI_INLINE T max_of(T a, T b) { return a < b ? b : a; }
template <class To, class From> SARATHI_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// A 32-bit word from an address that need not be aligned, nor hold that type.
template <class T> SARATHI_INLINE T load_word(const void* p) {
  static_assert(sizeof(T) == 4);
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2^f on [-0.5, 0.5], relative error 7.5e-8; the coefficients of a minimax fit.
constexpr float kExp2Poly[6] = {1.00000007f, 0.693146967f, 0.240221197f, 0.0555071328f, 0.00967554131f, 0.00132764691f};

SARATHI_INLINE float scalar_of(float x) { return x; }
SARATHI_INLINE float scalar_of(Bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
SARATHI_INLINE float scalar_of(int8_t x) { return x; }
SARATHI_INLINE float scalar_of(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float value = bit_cast<float>(magnitude) * 0x1p112f;  // rebiases the exponent; exact for subnormals too
  const uint32_t special = value >= 65536.0f ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(value) | special | sign);
}

SARATHI_INLINE void store_scalar(float* p, float x) { *p = x; }
SARATHI_INLINE void store_scalar(Bf16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
SARATHI_INLINE void store_scalar(Half* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) h = 0x7e00;
  else if (magnitude >= 0x477ff000) h = 0x7c00;                                           // rounds to infinity
  else if (magnitude < 0x38800000)                                                        // subnormal: let the FPU round
    h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  else h = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  p->bits = static_cast<uint16_t>(h | sign);
}

#if defined(__AVX512F__)  // ---------------------------------------------------------------------------------------------

using F = __m512;
constexpr int kLanes = 16;
SARATHI_INLINE F zero() { return _mm512_setzero_ps(); }
SARATHI_INLINE F set1(float x) { return _mm512_set1_ps(x); }
SARATHI_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
SARATHI_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
SARATHI_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
SARATHI_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SARATHI_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SARATHI_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
SARATHI_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SARATHI_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
SARATHI_INLINE F abs(F a) { return _mm512_abs_ps(a); }
SARATHI_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SARATHI_INLINE F where_greater(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes); }
SARATHI_INLINE bool any_different(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
SARATHI_INLINE float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
SARATHI_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
// to[r * stride + j] = sum of the lanes of x[j][r], for 4 j: a transposition whose steps add.
template <int R>
SARATHI_INLINE void reduce_rows(const F (&x)[4][R], float* to, int stride) {
  F u[R];  // in each 128-bit quarter, four partial sums, of x[0][r] to x[3][r]
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const F ab = add(_mm512_unpacklo_ps(x[0][r], x[1][r]), _mm512_unpackhi_ps(x[0][r], x[1][r]));
    const F cd = add(_mm512_unpacklo_ps(x[2][r], x[3][r]), _mm512_unpackhi_ps(x[2][r], x[3][r]));
    u[r] = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r += 2) {
    const F a = u[r], b = u[r + 1 < R ? r + 1 : r];
    const F half = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));  // a: quarters 0, 1; b: 2, 3
    const F whole = add(half, _mm512_shuffle_f32x4(half, half, 0xb1));
    _mm_storeu_ps(to + r * stride, _mm512_castps512_ps128(whole));
    if (r + 1 < R) _mm_storeu_ps(to + (r + 1) * stride, _mm512_extractf32x4_ps(whole, 2));
  }
}
// x where lo <= key < hi, else -inf; lo and hi: [kLanes].
SARATHI_INLINE F mask_range(F x, int32_t key, const int32_t* lo, const int32_t* hi) {
  const __m512i k = _mm512_set1_epi32(key);
  const __mmask16 in = _mm512_cmple_epi32_mask(_mm512_loadu_si512(lo), k) & _mm512_cmplt_epi32_mask(k, _mm512_loadu_si512(hi));
  return _mm512_mask_blend_ps(in, set1(-kInfinity), x);
}
// x where lo <= key[lane] < hi, else -inf.
SARATHI_INLINE F mask_keys(F x, const int32_t* key, int32_t lo, int32_t hi) {
  const __m512i k = _mm512_loadu_si512(key);
  const __mmask16 in = _mm512_cmpge_epi32_mask(k, _mm512_set1_epi32(lo)) & _mm512_cmplt_epi32_mask(k, _mm512_set1_epi32(hi));
  return _mm512_mask_blend_ps(in, set1(-kInfinity), x);
}
// to[c * to_stride + r] = from[r * from_stride + c] for r, c in [0, kLanes).
SARATHI_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {
  F t[16], u[16];  // u[4 * i + c], quarter j: column 4 * j + c of rows 4 * i .. 4 * i + 3
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const F a = load(from + i * from_stride), b = load(from + (i + 1) * from_stride);
    t[i] = _mm512_unpacklo_ps(a, b), t[i + 1] = _mm512_unpackhi_ps(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const F even_low = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), even_high = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const F odd_low = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd), odd_high = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    store(to + c * to_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    store(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    store(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    store(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}
// p * 2^n for the rounded exponent n of exp2 below; exactly 0 far below the range of a float.
constexpr float kExp2Low = -160.0f;
SARATHI_INLINE F scale_by_power(F p, F n) { return _mm512_scalef_ps(p, n); }

SARATHI_INLINE F load_as(const float* p) { return load(p); }
SARATHI_INLINE F load_as(const Bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
SARATHI_INLINE F load_as(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SARATHI_INLINE F load_as(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
SARATHI_INLINE void store_as(float* p, F x) { store(p, x); }
SARATHI_INLINE void store_as(Half* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SARATHI_INLINE void store_as(Bf16* p, F x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}

#elif defined(__AVX2__)  // ----------------------------------------------------------------------------------------------

using F = __m256;
constexpr int kLanes = 8;
SARATHI_INLINE F zero() { return _mm256_setzero_ps(); }
SARATHI_INLINE F set1(float x) { return _mm256_set1_ps(x); }
SARATHI_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
SARATHI_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
SARATHI_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
SARATHI_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
SARATHI_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SARATHI_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
SARATHI_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
SARATHI_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
SARATHI_INLINE F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
SARATHI_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SARATHI_INLINE F where_greater(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
SARATHI_INLINE bool any_different(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
SARATHI_INLINE float reduce_add(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
SARATHI_INLINE float reduce_max(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
SARATHI_INLINE __m256i load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SARATHI_INLINE F mask_outside(F x, __m256i key, __m256i lo, __m256i hi) {
  const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(lo, key), _mm256_xor_si256(_mm256_cmpgt_epi32(hi, key), _mm256_set1_epi32(-1)));
  return _mm256_blendv_ps(x, set1(-kInfinity), _mm256_castsi256_ps(out));
}
SARATHI_INLINE F mask_range(F x, int32_t key, const int32_t* lo, const int32_t* hi) {
  return mask_outside(x, _mm256_set1_epi32(key), load_int(lo), load_int(hi));
}
SARATHI_INLINE F mask_keys(F x, const int32_t* key, int32_t lo, int32_t hi) {
  return mask_outside(x, load_int(key), _mm256_set1_epi32(lo), _mm256_set1_epi32(hi));
}
SARATHI_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {
  F t[8], u[8];  // u[4 * i + c], half j: column 4 * j + c of rows 4 * i .. 4 * i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const F a = load(from + i * from_stride), b = load(from + (i + 1) * from_stride);
    t[i] = _mm256_unpacklo_ps(a, b), t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    store(to + c * to_stride, _mm256_permute2f128_ps(u[c], u[4 + c], 0x20));
    store(to + (4 + c) * to_stride, _mm256_permute2f128_ps(u[c], u[4 + c], 0x31));
  }
}
constexpr float kExp2Low = -127.0f;  // whose exponent field is 0: the factor is exactly 0
SARATHI_INLINE F scale_by_power(F p, F n) {
  return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}

SARATHI_INLINE F load_as(const float* p) { return load(p); }
SARATHI_INLINE F load_as(const Bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
SARATHI_INLINE F load_as(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SARATHI_INLINE F load_as(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
SARATHI_INLINE void store_as(float* p, F x) { store(p, x); }
SARATHI_INLINE void store_as(Half* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SARATHI_INLINE void store_as(Bf16* p, F x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}

#else  // ---- any CPU: the compiler's own vectors ------------------------------------------------------------------------

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int kLanes = 4;
SARATHI_INLINE F set1(float x) { return F{x, x, x, x}; }
SARATHI_INLINE F zero() { return set1(0.0f); }
SARATHI_INLINE F load(const float* p) { F x; std::memcpy(&x, p, sizeof x); return x; }
SARATHI_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
SARATHI_INLINE F add(F a, F b) { return a + b; }
SARATHI_INLINE F sub(F a, F b) { return a - b; }
SARATHI_INLINE F mul(F a, F b) { return a * b; }
SARATHI_INLINE F div(F a, F b) { return a / b; }
SARATHI_INLINE F fma(F a, F b, F c) { return a * b + c; }
SARATHI_INLINE F max(F a, F b) { return a > b ? a : b; }
SARATHI_INLINE F abs(F a) { return a < 0.0f ? -a : a; }
SARATHI_INLINE F round(F a) {  // for |a| < 2^22, all that exp2 and int8 need
  return (a + 12582912.0f) - 12582912.0f;
}
SARATHI_INLINE F where_greater(F a, F b, F yes, F no) { return a > b ? yes : no; }
SARATHI_INLINE bool any_different(F a, F b) { return a[0] != b[0] || a[1] != b[1] || a[2] != b[2] || a[3] != b[3]; }
SARATHI_INLINE float reduce_add(F a) { return (a[0] + a[1]) + (a[2] + a[3]); }
SARATHI_INLINE float reduce_max(F a) { return max_of(max_of(a[0], a[1]), max_of(a[2], a[3])); }
SARATHI_INLINE F mask_keys(F x, I key, I lo, I hi) { return ((lo <= key) & (key < hi)) ? x : set1(-kInfinity); }
SARATHI_INLINE F mask_range(F x, int32_t key, const int32_t* lo, const int32_t* hi) {
  I l, h;
  std::memcpy(&l, lo, sizeof l);
  std::memcpy(&h, hi, sizeof h);
  return mask_keys(x, I{key, key, key, key}, l, h);
}
SARATHI_INLINE F mask_keys(F x, const int32_t* key, int32_t lo, int32_t hi) {
  I k;
  std::memcpy(&k, key, sizeof k);
  return mask_keys(x, k, I{lo, lo, lo, lo}, I{hi, hi, hi, hi});
}
SARATHI_INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < kLanes; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}
constexpr float kExp2Low = -127.0f;
SARATHI_INLINE F scale_by_power(F p, F n) { return p * bit_cast<F>((__builtin_convertvector(n, I) + 127) << 23); }

template <class T> SARATHI_INLINE F load_as(const T* p) { return F{scalar_of(p[0]), scalar_of(p[1]), scalar_of(p[2]), scalar_of(p[3])}; }
SARATHI_INLINE F load_as(const float* p) { return load(p); }
template <class T> SARATHI_INLINE void store_as(T* p, F x) { for (int i = 0; i < kLanes; ++i) store_scalar(p + i, x[i]); }
SARATHI_INLINE void store_as(float* p, F x) { store(p, x); }

#endif  // ---------------------------------------------------------------------------------------------------------------

#if !defined(__AVX512F__)
template <int N, int R>
SARATHI_INLINE void reduce_rows(const F (&x)[N][R], float* to, int stride) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) to[r * stride + j] = reduce_add(x[j][r]);
}
#endif

// A hint: the cache line at p will be read soon; brought to the second cache level, which holds two key blocks.
SARATHI_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// 2^x for x <= 127; exactly 0 where x <= kExp2Low (so for -inf).
SARATHI_INLINE F exp2(F x) {
  x = max(x, set1(kExp2Low));
  const F n = round(x), f = sub(x, n);
  F p = fma(set1(kExp2Poly[5]), f, set1(kExp2Poly[4]));
  p = fma(p, f, set1(kExp2Poly[3]));
  p = fma(p, f, set1(kExp2Poly[2]));
  p = fma(p, f, set1(kExp2Poly[1]));
  p = fma(p, f, set1(kExp2Poly[0]));
  return scale_by_power(p, n);
}

// tanh(x / log2(e)) for an argument that is already in units of log2(e): 1 - 2 / (2^(2x) + 1).
SARATHI_INLINE F tanh2(F x) {
  const F e = exp2(where_greater(x, set1(60.0f), set1(120.0f), add(x, x)));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

// The two compute types. An operand is 32 bits wide: one float, or two bfloat16 that are multiplied and added as a pair.
struct Fma {
  using Vector = F;
  static constexpr int kDepth = 1;  // elements per operand
  static SARATHI_INLINE Vector load_operands(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static SARATHI_INLINE Vector broadcast(const uint32_t* p) { return set1(load_word<float>(p)); }
  static SARATHI_INLINE F dot(F acc, Vector a, Vector b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
  using Vector = __m512i;
  static constexpr int kDepth = 2;
  static SARATHI_INLINE Vector load_operands(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static SARATHI_INLINE Vector broadcast(const uint32_t* p) { return _mm512_set1_epi32(load_word<int32_t>(p)); }
  static SARATHI_INLINE F dot(F acc, Vector a, Vector b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
// (a0, b0), (a1, b1), ...: lane i of two vectors rounded to bfloat16 and set side by side.
SARATHI_INLINE __m512i round_pairs(F a, F b) {
  const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(index, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}
#endif

}  // namespace
}  // namespace sarathi
