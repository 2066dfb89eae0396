// What both attention kernels need of a work item: where its query rows and keys lie, which keys a row may see, and how a
// finished row is written. Internal linkage throughout, see simd.h.
#pragma once
#include <cmath>

#include "../params.h"
#include "simd.h"

namespace sarathi {
namespace {

// One cache (K or V) of one request, seen through its block table.
template <class T>
struct PagedRows {
  const T* cache;               // of kv head 0
  const int32_t* pages;         // block_table row of the request
  int64_t stride_page, stride_slot, stride_head;
  int32_t page_size;

  // rows[i] = row of key first + i for `head`, for i in [0, count).
  SARATHI_INLINE void find(int32_t first, int32_t count, int32_t head, const T** rows) const {
    int32_t page = first / page_size, slot = first - page * page_size;
    const T* base = cache + head * stride_head;
    for (int32_t i = 0; i < count; ++page, slot = 0) {
      const T* row = base + pages[page] * stride_page + slot * stride_slot;
      const int32_t stop = min_of(count, i + page_size - slot);
      for (; i < stop; ++i, row += stride_slot) rows[i] = row;
    }
  }
};

template <class T>
SARATHI_INLINE PagedRows<T> keys_of(const AttentionParams& p, const WorkItem& item) {
  return {static_cast<const T*>(p.k_cache), p.block_table + item.request * p.block_table_stride,
          p.k_stride_page, p.k_stride_slot, p.k_stride_head, p.page_size};
}
template <class T>
SARATHI_INLINE PagedRows<T> values_of(const AttentionParams& p, const WorkItem& item) {
  return {static_cast<const T*>(p.v_cache), p.block_table + item.request * p.block_table_stride,
          p.v_stride_page, p.v_stride_slot, p.v_stride_head, p.page_size};
}
// The int8 cache's scales, [num_pages, page_size, num_kv_heads], are rows of one element.
SARATHI_INLINE PagedRows<float> scales_of(const AttentionParams& p, const WorkItem& item, const float* scale) {
  return {scale, p.block_table + item.request * p.block_table_stride,
          static_cast<int64_t>(p.page_size) * p.num_kv_heads, p.num_kv_heads, 1, p.page_size};
}

SARATHI_INLINE int32_t round_up(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }

// Token and query head of a packed row.
struct RowPlace {
  int64_t token;   // in the batch
  int32_t q_head;
};
SARATHI_INLINE RowPlace place_of(const AttentionParams& p, int32_t q_begin, int32_t kv_head, int32_t row) {
  const int32_t group = p.num_q_heads / p.num_kv_heads;
  return {static_cast<int64_t>(q_begin) + row / group, kv_head * group + row % group};
}

// Keys [lo, hi) are what the token of a row may see, within the item's own range.
struct KeyRange { int32_t lo, hi; };
SARATHI_INLINE KeyRange visible_to(const AttentionParams& p, const WorkItem& item, int32_t row) {
  const int32_t group = p.num_q_heads / p.num_kv_heads;
  const int32_t position = item.kv_len - item.q_len + row / group;
  int32_t lo = item.kv_begin, hi = item.kv_end;
  if (p.causal) hi = max_of(lo, min_of(hi, position + 1));
  if (p.window_left >= 0) lo = min_of(hi, max_of(lo, position - p.window_left));
  return {lo, hi};
}

// Whether any tree mask bit can be off in the request: the op promises -1 for requests of more than 64 query tokens.
SARATHI_INLINE bool has_tree(const AttentionParams& p, const WorkItem& item) { return p.tree_mask && item.q_len <= 64; }
SARATHI_INLINE uint64_t tree_bits_of(const AttentionParams& p, const WorkItem& item, int32_t row) {
  return static_cast<uint64_t>(p.tree_mask[item.q_begin + row / (p.num_q_heads / p.num_kv_heads)]);
}
SARATHI_INLINE bool tree_allows(const AttentionParams& p, const WorkItem& item, int32_t row, int32_t key) {
  const int32_t bit = key - (item.kv_len - item.q_len);
  return bit < 0 || bit > 63 || ((tree_bits_of(p, item, row) >> bit) & 1);
}

template <class T>
SARATHI_INLINE void store_row(T* to, const float* from, float factor, int32_t n) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_as(to + i, mul(load(from + i), set1(factor)));
  for (; i < n; ++i) store_scalar(to + i, from[i] * factor);
}

// Writes one normalised row, [head_dim], and its natural log-sum-exp, letting the sink into the denominator first.
template <class T>
SARATHI_INLINE void write_row(const AttentionParams& p, int32_t q_begin, int32_t kv_head, int32_t row, const float* values, float lse) {
  const RowPlace place = place_of(p, q_begin, kv_head, row);
  float factor = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[place.q_head], top = max_of(lse, sink);
    const float total = top == -kInfinity ? top : top + logf(expf(lse - top) + expf(sink - top));
    factor = lse == -kInfinity ? 0.0f : expf(lse - total);
    lse = total;
  }
  store_row(static_cast<T*>(p.out) + place.token * p.out_stride_token + place.q_head * p.out_stride_head, values, factor, p.head_dim);
  if (p.lse) p.lse[place.token * p.num_q_heads + place.q_head] = lse;
}

// A finished row of an item: to the partials if the tile is split, else to the output. `row` counts from the item's first.
template <class T>
SARATHI_INLINE void finish_row(const AttentionParams& p, const WorkItem& item, int32_t kv_head, int32_t row, const float* values, float lse) {
  if (item.partial_row < 0) return write_row<T>(p, item.q_begin, kv_head, item.row_begin + row, values, lse);
  const int64_t at = static_cast<int64_t>(item.partial_row + row) * p.num_kv_heads + kv_head;
  store_row(p.partial_out + at * p.head_dim, values, 1.0f, p.head_dim);
  p.partial_lse[at] = lse;
}

}  // namespace
}  // namespace sarathi
