// New keys and values into their pages; on the way, the rotary embedding of k (and of q, in place), and int8 quantisation.
//
//     (x_i, x_{i+half}) -> (x_i cos - x_{i+half} sin, x_{i+half} cos + x_i sin)        half = rotary_dim / 2
#include <cstring>

#include "request.h"
#include "variant.h"

namespace sarathi::SARATHI_ISA {
namespace {

constexpr int32_t kMaxHeadDim = 512;

// to = x, rotated by one row of cos_sin (null: as it is), in float32.
template <class T>
SARATHI_INLINE void rotate(const T* x, const float* cos_sin, int32_t rotary_dim, int32_t head_dim, float* to) {
  const int32_t half = cos_sin ? rotary_dim / 2 : 0;
  const float *cos = cos_sin, *sin = cos_sin + half;
  int32_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F a = load_as(x + i), b = load_as(x + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, sub(mul(a, c), mul(b, s)));
    store(to + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = scalar_of(x[i]), b = scalar_of(x[half + i]);
    to[i] = a * cos[i] - b * sin[i];
    to[half + i] = b * cos[i] + a * sin[i];
  }
  for (i = 2 * half; i + kLanes <= head_dim; i += kLanes) store(to + i, load_as(x + i));
  for (; i < head_dim; ++i) to[i] = scalar_of(x[i]);
}

// One row into the cache: as T, or as int8 with the row's scale.
template <class T>
SARATHI_INLINE void put_row(const float* x, int32_t head_dim, T* to, float*) { store_row(to, x, 1.0f, head_dim); }

SARATHI_INLINE void put_row(const float* x, int32_t head_dim, int8_t* to, float* scale) {
  F top = zero();
  int32_t i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) top = max(top, abs(load(x + i)));
  float largest = reduce_max(top);
  for (; i < head_dim; ++i) largest = max_of(largest, fabsf(x[i]));
  *scale = largest / 127.0f;
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  alignas(64) float rounded[kMaxHeadDim];
  for (i = 0; i + kLanes <= head_dim; i += kLanes) store(rounded + i, round(mul(load(x + i), set1(inverse))));
  for (; i < head_dim; ++i) rounded[i] = rintf(x[i] * inverse);
  for (i = 0; i < head_dim; ++i) to[i] = static_cast<int8_t>(rounded[i]);
}

// The heads of one token where nothing is computed on the way: one run of memory where both sides' heads lie together.
template <class T>
SARATHI_INLINE void copy_heads(const T* from, int64_t from_stride, T* to, int64_t to_stride, int32_t heads, int32_t head_dim) {
  if (from_stride == head_dim && to_stride == head_dim) head_dim *= heads, heads = 1;
  for (int32_t h = 0; h < heads; ++h) std::memcpy(to + h * to_stride, from + h * from_stride, head_dim * sizeof(T));
}

template <class T, class KV>
void append(const AppendKvParams& p, int32_t token_begin, int32_t token_end) {
  constexpr bool quantised = sizeof(KV) == 1;
  alignas(64) float row[kMaxHeadDim];
  const auto slot_of = [&p](void* cache, int64_t slot, int64_t stride_page, int64_t stride_slot) {
    return static_cast<KV*>(cache) + slot / p.page_size * stride_page + slot % p.page_size * stride_slot;
  };
  for (int32_t t = token_begin; t < token_end; ++t) {
    const float* cos_sin = p.cos_sin ? p.cos_sin + static_cast<int64_t>(p.positions[t]) * p.rotary_dim : nullptr;
    if (p.q && cos_sin)
      for (int32_t h = 0; h < p.num_q_heads; ++h) {
        T* q = static_cast<T*>(p.q) + t * p.q_stride_token + h * p.q_stride_head;
        rotate(q, cos_sin, p.rotary_dim, p.head_dim, row);
        store_row(q, row, 1.0f, p.head_dim);
      }
    const int64_t slot = p.slot_mapping[t];
    if (slot < 0) continue;
    const T *k = static_cast<const T*>(p.k) + t * p.k_stride_token, *v = static_cast<const T*>(p.v) + t * p.v_stride_token;
    KV* const k_slot = slot_of(p.k_cache, slot, p.kc_stride_page, p.kc_stride_slot);
    KV* const v_slot = slot_of(p.v_cache, slot, p.vc_stride_page, p.vc_stride_slot);
    if constexpr (!quantised) {
      if (!cos_sin) copy_heads(k, p.k_stride_head, k_slot, p.kc_stride_head, p.num_kv_heads, p.head_dim);
      copy_heads(v, p.v_stride_head, v_slot, p.vc_stride_head, p.num_kv_heads, p.head_dim);
      if (!cos_sin) continue;
    }
    for (int32_t h = 0; h < p.num_kv_heads; ++h) {
      const int64_t scale = quantised ? slot * p.num_kv_heads + h : 0;  // unused where there are none
      rotate(k + h * p.k_stride_head, cos_sin, p.rotary_dim, p.head_dim, row);
      put_row(row, p.head_dim, k_slot + h * p.kc_stride_head, quantised ? p.k_scale + scale : nullptr);
      if constexpr (!quantised) continue;
      rotate(v + h * p.v_stride_head, static_cast<const float*>(nullptr), 0, p.head_dim, row);
      put_row(row, p.head_dim, v_slot + h * p.vc_stride_head, quantised ? p.v_scale + scale : nullptr);
    }
  }
}

}  // namespace

void append_kv(const AppendKvParams& p, int32_t begin, int32_t end) {
  const bool int8 = p.kv_dtype == DType::kInt8;
  switch (p.dtype) {
    case DType::kFloat32: return (int8 ? append<float, int8_t> : append<float, float>)(p, begin, end);
    case DType::kBFloat16: return (int8 ? append<Bf16, int8_t> : append<Bf16, Bf16>)(p, begin, end);
    case DType::kFloat16: return (int8 ? append<Half, int8_t> : append<Half, Half>)(p, begin, end);
    default: __builtin_trap();
  }
}

}  // namespace sarathi::SARATHI_ISA
