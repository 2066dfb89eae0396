// Combining softmax states over disjoint keys:
//
//     lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s
#include "request.h"
#include "variant.h"

namespace sarathi::SARATHI_ISA {
namespace {

// values[d] = merged row, from states at outs + s * out_stride and lses + s * lse_stride. Returns the merged lse. A state whose
// lse is -inf saw no key, and its row may hold anything.
template <class T>
float merge_row(const T* outs, int64_t out_stride, const float* lses, int64_t lse_stride, int32_t num_states, int32_t head_dim, float* values) {
  float top = -kInfinity, total = 0.0f;
  for (int32_t s = 0; s < num_states; ++s) top = max_of(top, lses[s * lse_stride]);
  for (int32_t d = 0; d < head_dim; ++d) values[d] = 0.0f;
  if (top == -kInfinity) return top;
  for (int32_t s = 0; s < num_states; ++s) total += expf(lses[s * lse_stride] - top);
  for (int32_t s = 0; s < num_states; ++s) {
    const float weight = expf(lses[s * lse_stride] - top) / total;
    if (weight == 0.0f) continue;
    const T* row = outs + s * out_stride;
    int32_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(values + d, fma(load_as(row + d), set1(weight), load(values + d)));
    for (; d < head_dim; ++d) values[d] += weight * scalar_of(row[d]);
  }
  return top + logf(total);
}

template <class T>
void merge_splits(const AttentionParams& p, const MergeItem& item, int32_t kv_head, float* values) {
  for (int32_t r = 0; r < item.row_count; ++r) {
    const int64_t at = static_cast<int64_t>(item.partial_row + r) * p.num_kv_heads + kv_head;
    const int64_t stride = static_cast<int64_t>(item.row_count) * p.num_kv_heads;
    const float lse = merge_row(p.partial_out + at * p.head_dim, stride * p.head_dim, p.partial_lse + at, stride, item.num_splits, p.head_dim, values);
    write_row<T>(p, item.q_begin, kv_head, item.row_begin + r, values, lse);
  }
}

template <class T>
void merge_rows(const MergeParams& p, int64_t begin, int64_t end, float* values) {
  for (int64_t r = begin; r < end; ++r) {
    p.lse[r] = merge_row(static_cast<const T*>(p.outs) + r * p.head_dim, p.rows * p.head_dim, p.lses + r, p.rows, p.num_states, p.head_dim, values);
    store_row(static_cast<T*>(p.out) + r * p.head_dim, values, 1.0f, p.head_dim);
  }
}

}  // namespace

void merge(const AttentionParams& p, const MergeItem& item, int32_t kv_head, char* scratch) {
  float* values = reinterpret_cast<float*>(scratch);
  switch (p.dtype) {
    case DType::kFloat32: return merge_splits<float>(p, item, kv_head, values);
    case DType::kBFloat16: return merge_splits<Bf16>(p, item, kv_head, values);
    case DType::kFloat16: return merge_splits<Half>(p, item, kv_head, values);
    default: __builtin_trap();
  }
}

void merge_states(const MergeParams& p, int64_t begin, int64_t end, char* scratch) {
  float* values = reinterpret_cast<float*>(scratch);
  switch (p.dtype) {
    case DType::kFloat32: return merge_rows<float>(p, begin, end, values);
    case DType::kBFloat16: return merge_rows<Bf16>(p, begin, end, values);
    case DType::kFloat16: return merge_rows<Half>(p, begin, end, values);
    default: __builtin_trap();
  }
}

}  // namespace sarathi::SARATHI_ISA
