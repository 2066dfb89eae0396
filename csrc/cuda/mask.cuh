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

// Bit j of a token's tree mask: may it see the j-th query token of its request? Beyond 64 tokens the mask says nothing.
SARATHI_HD bool tree_allows(int64_t tree_mask, int32_t key, int32_t first_new_key) {
  const int32_t j = key - first_new_key;
  return j < 0 || j > 63 || ((tree_mask >> j) & 1) != 0;
}

// Keys that every row of the item sees: a tile of keys inside this span needs no mask. first, last: tokens of the item's
// first and last row.
SARATHI_HD KeySpan clear_span(const AttentionParams& p, const WorkItem& item, int32_t first, int32_t last) {
  KeySpan span{visible_span(p, item, last).begin, visible_span(p, item, first).end};
  if (p.tree_mask != nullptr && item.kv_len - item.q_len < span.end) span.end = item.kv_len - item.q_len;
  return span;
}

}  // namespace sarathi
