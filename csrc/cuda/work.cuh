// Which (work item, kv head) a CTA does next, and the arithmetic by which splits find each other.
#pragma once
#include <cstdint>

#include "params.h"

#define SARATHI_HD __host__ __device__ __forceinline__

namespace sarathi {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

SARATHI_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// One work item for one kv head.
struct Unit { int32_t item, kv_head; };

// Prefill tiles that stand next to each other in the table are mostly tiles of one request: this many of them are done for
// one kv head before the next head, so that the keys and values they all read come from L2. Decodes go head by head: the
// heads of a token are neighbours in memory.
constexpr int kAdjacentPrefillTiles = 16;

// Unit number `index` of the items [first_item, first_item + num_items).
SARATHI_HD Unit unit_at(int32_t index, int32_t first_item, int32_t num_items, int32_t num_kv_heads, int32_t adjacent) {
  const int32_t begin = index / (adjacent * num_kv_heads) * adjacent;
  const int32_t width = num_items - begin < adjacent ? num_items - begin : adjacent;
  const int32_t within = index - begin * num_kv_heads;
  return {first_item + begin + within % width, within / width};
}

// The two CTAs of an SM lead with different work: one keeps the tensor cores busy, the other the memory system.
enum Role : int32_t { kComputeRole = 0, kBandwidthRole = 1 };

// Blocks are dealt to the SMs round by round, so the second half of the grid are the second CTAs; the SM's parity alternates
// which of the two is which, so that a grid smaller than the machine has both. Only speed depends on it.
SARATHI_HD int32_t role_of(int32_t block, int32_t num_blocks, int32_t sm) {
  return ((block >= (num_blocks + 1) / 2 ? 1 : 0) + sm) & 1;
}

// The queue: two cursors into the plan, prefill and decode units. They only ever grow, and are reset by the last CTA.
struct QueueState { int32_t prefill_taken, prefill_total, decode_taken, decode_total; };

// Compute leads take prefill while there is any. Bandwidth leads take decodes, but no faster than prefill advances: decodes
// then last as long as there is prefill to hide behind them, and small decode units are left to level the end.
SARATHI_HD bool takes_decode(int32_t role, const QueueState& q) {
  if (q.prefill_taken >= q.prefill_total) return true;
  if (q.decode_taken >= q.decode_total || role == kComputeRole) return false;
  return static_cast<int64_t>(q.decode_taken) * q.prefill_total <= static_cast<int64_t>(q.prefill_taken) * q.decode_total;
}

// Query token and query head of a packed row, and where they lie.
struct RowPlace { int32_t token, head_in_group; };
SARATHI_HD RowPlace place_of(int32_t row, int32_t group) { return {row / group, row % group}; }

// Element (float) index of a partial row's output; divided by head_dim it is the index of its lse.
SARATHI_HD int64_t partial_index(int32_t partial_row, int32_t num_kv_heads, int32_t kv_head, int32_t head_dim) {
  return (static_cast<int64_t>(partial_row) * num_kv_heads + kv_head) * head_dim;
}

}  // namespace sarathi
