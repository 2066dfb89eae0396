// The tables and argument blocks that every native backend shares. Plain old data; each pointer has its shape beside it.
// The Python side of the same layout is sarathi_kernels/plan.py; a test holds the two together.
#pragma once
#include <cstdint>

#include "plan_math.h"

namespace sarathi {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8E4M3 = 4 };

enum TileClass : int32_t { kDecodeTile = 0, kPrefillTile = 1 };

// One tile of query rows against one range of keys, for EVERY kv head: a kernel visits (item, kv_head) pairs.
// "Packed rows" are the query rows of one request that share a kv head: row = token * group + head_in_group,
// group = num_q_heads / num_kv_heads, so that GQA heads fill the tile and K/V are read once for all of them.
struct WorkItem {
  int32_t request;       // index into cu_seqlens_q / seqused_k / block_table
  int32_t row_begin;     // first packed row of the tile, within the request
  int32_t row_count;     // packed rows in the tile (the last tile of a request may be short)
  int32_t kv_begin;      // keys [kv_begin, kv_end) of the request; empty when no row of the tile sees a key
  int32_t kv_end;
  int32_t q_begin;       // cu_seqlens_q[request]
  int32_t q_len;         // query tokens of the request in this batch
  int32_t kv_len;        // seqused_k[request]
  int32_t tile_class;    // TileClass; a property of the request, never of the batch
  int32_t partial_row;   // first row of this split in partial_out / partial_lse, or -1: write straight to out
  int32_t merge_index;   // the MergeItem this split belongs to, or -1
  int32_t split_index;   // which of the merge's splits this is (0 when not split)
};
static_assert(sizeof(WorkItem) == 12 * sizeof(int32_t), "WorkItem is 12 int32, without padding");

// The splits of one tile, to be combined in split order. Split s, row r lives at partial row
// partial_row + s * row_count + r.
struct MergeItem {
  int32_t request;
  int32_t row_begin;
  int32_t row_count;
  int32_t q_begin;
  int32_t q_len;
  int32_t kv_len;
  int32_t partial_row;
  int32_t num_splits;
};
static_assert(sizeof(MergeItem) == 8 * sizeof(int32_t), "MergeItem is 8 int32, without padding");

// `counts`, the fixed-size head of a plan. On a GPU the kernel reads it from device memory, so one captured graph
// replays plans of any size up to the capacity of the tables.
struct PlanCounts {
  int32_t num_items;          // work items; items [0, num_prefill_items) are prefill tiles, the rest decode tiles,
  int32_t num_prefill_items;  // each part in descending order of cost (longest processing time first)
  int32_t num_merges;
  int32_t num_partial_rows;
};

// Counters behind the merges', for a backend whose workers draw their items from a shared queue.
constexpr int kQueueCounters = 4;

// Everything one attention call needs. Strides are in elements. The innermost (head_dim) stride is 1 everywhere.
struct AttentionParams {
  const void* q;                // [total_q, num_q_heads, head_dim] dtype
  const void* k_cache;          // [num_pages, page_size, num_kv_heads, head_dim] kv_dtype
  const void* v_cache;          // like k_cache
  void* out;                    // [total_q, num_q_heads, head_dim] dtype
  float* lse;                   // [total_q, num_q_heads] float32, contiguous, natural log; may be null
  const int32_t* block_table;   // [batch, max_pages]
  const WorkItem* work_items;   // [num_items]
  const MergeItem* merge_items; // [num_merges]
  float* partial_out;           // [num_partial_rows, num_kv_heads, head_dim], normalised within the split
  float* partial_lse;           // [num_partial_rows, num_kv_heads], natural log
  int32_t* counters;            // [num_merges, num_kv_heads], then kQueueCounters more; zero before and after every call
  const float* sinks;           // [num_q_heads] or null: one more logit in each row's softmax denominator
  const int64_t* tree_mask;     // [total_q] or null: bit j of a row = may see the j-th query token of its request
  const float* k_scale;         // float8: [num_kv_heads]; int8: [num_pages, page_size, num_kv_heads]; else null
  const float* v_scale;         // like k_scale
  int64_t q_stride_token, q_stride_head;
  int64_t out_stride_token, out_stride_head;
  int64_t k_stride_page, k_stride_slot, k_stride_head;
  int64_t v_stride_page, v_stride_slot, v_stride_head;
  int64_t block_table_stride;
  int32_t num_items, num_prefill_items, num_merges;
  int32_t num_q_heads, num_kv_heads, head_dim, page_size;
  DType dtype, kv_dtype;
  float softmax_scale;
  float softcap;                // 0 = off: scores become softcap * tanh(score / softcap), before the mask
  int32_t causal;               // bottom-right aligned: row of token t sees keys [0, kv_len - q_len + t]
  int32_t window_left;          // -1 = none: and only keys >= kv_len - q_len + t - window_left
  int32_t total_q;
  const PlanCounts* counts;     // [1] in device memory: overrules num_items, num_prefill_items, num_merges; null on the CPU
};

// The device planner: reads the requests where they are, writes the tables of a plan.
struct PlanParams {
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* seqused_k;     // [batch]
  WorkItem* work_items;         // [max_items]; this and all below at multiples of 16 bytes
  MergeItem* merge_items;       // [max_merges]
  PlanCounts* counts;           // [1]; num_items = -1, and nothing else written, when the tables are too small
  int32_t* tile_begin;          // [batch + 1] scratch
  int32_t* tiles;               // [max_items, 4] scratch
  int64_t max_partial_rows;
  int32_t batch, max_items, max_merges;
  PlanConfig config;
};

// K and V of the new tokens into their pages, with optional rotary embedding of k (and of q, in place) on the way.
struct AppendKvParams {
  const void* k;                // [total_q, num_kv_heads, head_dim] dtype
  const void* v;                // like k
  void* k_cache;                // [num_pages, page_size, num_kv_heads, head_dim] kv_dtype
  void* v_cache;
  const int64_t* slot_mapping;  // [total_q]: page * page_size + offset; -1 = skip this token
  void* q;                      // [total_q, num_q_heads, head_dim] dtype, rotated in place; null = none
  const float* cos_sin;         // [max_position, rotary_dim]: cos of the first half, then sin; null = no rotary
  const int32_t* positions;     // [total_q], required with cos_sin
  float* k_scale;               // int8: [num_pages, page_size, num_kv_heads] written; float8: [num_kv_heads] read
  float* v_scale;
  int64_t k_stride_token, k_stride_head, v_stride_token, v_stride_head, q_stride_token, q_stride_head;
  int64_t kc_stride_page, kc_stride_slot, kc_stride_head, vc_stride_page, vc_stride_slot, vc_stride_head;
  int32_t total_q, num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  DType dtype, kv_dtype;
};

// states [num_states, rows, head_dim] + [num_states, rows] -> [rows, head_dim] + [rows]; rows = tokens * heads, contiguous.
struct MergeParams {
  const void* outs;             // [num_states, rows, head_dim] dtype
  const float* lses;            // [num_states, rows]
  void* out;                    // [rows, head_dim] dtype
  float* lse;                   // [rows]
  int64_t rows;
  int32_t num_states, head_dim;
  DType dtype;
};

}  // namespace sarathi
