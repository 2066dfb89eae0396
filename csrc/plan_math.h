// The planner's arithmetic, which the host planner (plan.cpp) and the device planner (cuda/plan.cuh) must agree on to the bit.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SARATHI_PLAN_FN __host__ __device__ __forceinline__
#else
#define SARATHI_PLAN_FN inline
#endif

namespace sarathi {

// What a backend wants of its plan. Everything here depends on the backend and the model, never on the batch: that is
// what keeps a row's bits independent of its neighbours.
struct PlanConfig {
  int32_t group;             // num_q_heads / num_kv_heads
  int32_t page_size;
  int32_t causal;
  int32_t window_left;       // -1 = none
  int32_t decode_rows;       // tile height of requests with at most this many packed rows
  int32_t prefill_rows;      // tile height of all others
  int32_t decode_split;      // keys per split, cut at absolute multiples of it
  int32_t prefill_split;
};

// The sort key is a bucket per tile class: 4 buckets per power of two of the key range, in units of 64 keys. Fine enough
// for longest-processing-time-first, and a counting sort over it is stable and linear.
constexpr int kPlanBuckets = 128;

SARATHI_PLAN_FN int log2_floor(uint32_t x) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(static_cast<int>(x));
#else
  return 31 - __builtin_clz(x);
#endif
}

SARATHI_PLAN_FN int bucket_of(int32_t num_keys) {
  const uint32_t x = (static_cast<uint32_t>(num_keys) + 63) / 64 + 4;
  const int log2 = log2_floor(x);
  return 4 * log2 + static_cast<int>((x >> (log2 - 2)) & 3u);
}

// Prefill buckets come first, each class in descending cost.
SARATHI_PLAN_FN int sort_key(bool prefill, int32_t num_keys) { return (prefill ? kPlanBuckets : 2 * kPlanBuckets) - 1 - bucket_of(num_keys); }

struct KeyRange { int32_t begin, end; };

// Union of the keys that the rows [row_begin, row_begin + row_count) of a request may see.
SARATHI_PLAN_FN KeyRange visible_keys(const PlanConfig& c, int32_t q_len, int32_t kv_len, int32_t row_begin, int32_t row_count) {
  const int64_t shift = static_cast<int64_t>(kv_len) - q_len;
  const int64_t first = shift + row_begin / c.group, last = shift + (row_begin + row_count - 1) / c.group;
  int64_t end = c.causal && last + 1 < kv_len ? last + 1 : kv_len;
  int64_t begin = c.window_left >= 0 && first > c.window_left ? first - c.window_left : 0;
  end = end > 0 ? end : 0;
  begin = begin < end ? begin : end;
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// Tiles of a request: all of one class, its packed rows cut at multiples of the class's height.
struct RequestTiles { int32_t rows, height, split; bool prefill; };
SARATHI_PLAN_FN RequestTiles request_tiles(const PlanConfig& c, int32_t q_len) {
  const int32_t rows = q_len * c.group;
  const bool prefill = rows > c.decode_rows;
  return {rows, prefill ? c.prefill_rows : c.decode_rows, prefill ? c.prefill_split : c.decode_split, prefill};
}

// Splits of a tile: cut at absolute multiples of the split length, so that they do not depend on what else is planned.
SARATHI_PLAN_FN int32_t num_splits_of(KeyRange keys, int32_t split) {
  return keys.end > keys.begin ? (keys.end - 1) / split - keys.begin / split + 1 : 1;
}
SARATHI_PLAN_FN KeyRange split_range(KeyRange keys, int32_t split, int32_t num_splits, int32_t s) {
  const int32_t first = keys.begin / split;
  return {s == 0 ? keys.begin : (first + s) * split, s + 1 == num_splits ? keys.end : (first + s + 1) * split};
}

}  // namespace sarathi
