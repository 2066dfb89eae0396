// Which keys a row sees: the spans of csrc/params.h, as arithmetic that the host can run too.
#pragma once
#include "work.cuh"

namespace sarathi {

struct KeySpan { int32_t begin, end; };

// Keys that the row of a token sees, within [kv_begin, kv_end), before the tree mask. May be empty (begin >= end).
SARATHI_HD KeySpan visible_span(const AttentionParams& p, const WorkItem& item, int32_t token) {
  const int32_t position = item.kv_len - item.q_len + token;
  KeySpan span{item.kv_begin, item.kv_end};
  if (p.causal && position + 1 < span.end) span.end = position + 1;
  if (p.window_left >= 0 && position - span.begin > p.window_left) span.begin = position - p.window_left;
  return span;
}

// 64 keys from `first_key` on as a word, bit b for key first_key + b, so that a thread tests constant bits of it.
SARATHI_HD uint64_t bits_from(int32_t n) { return n <= 0 ? ~0ull : n < 64 ? ~0ull << n : 0ull; }

// What a tree mask lets a token see of them. Its bit j stands for the j-th query token of the request; it says nothing of
// older keys, nor of tokens beyond the 64th.
SARATHI_HD uint64_t tree_bits(int64_t tree_mask, int32_t first_key, int32_t first_new_key) {
  const int32_t j = first_key - first_new_key;
  if (j >= 64 || j <= -64) return ~0ull;
  const auto mask = static_cast<uint64_t>(tree_mask);
  return j >= 0 ? mask >> j | bits_from(64 - j) : mask << -j | ~bits_from(-j);
}

SARATHI_HD uint64_t visible_bits(KeySpan span, uint64_t tree, int32_t first_key) {
  return bits_from(span.begin - first_key) & ~bits_from(span.end - first_key) & tree;
}

// Keys that every row of the item sees: a tile of keys inside this span needs no mask. first, last: tokens of the item's
// first and last row.
SARATHI_HD KeySpan clear_span(const AttentionParams& p, const WorkItem& item, int32_t first, int32_t last) {
  KeySpan span{visible_span(p, item, last).begin, visible_span(p, item, first).end};
  if (p.tree_mask != nullptr && item.kv_len - item.q_len < span.end) span.end = item.kv_len - item.q_len;
  return span;
}

}  // namespace sarathi
