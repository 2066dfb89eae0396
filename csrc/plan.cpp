#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sarathi {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string at(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// Validates one batch and returns the largest page id in use.
int32_t check(const PlanConfig& config, const Batch& b) {
  if (b.batch < 0) fail("batch must not be negative, got " + std::to_string(b.batch));
  if (b.cu_seqlens_q[0] != 0) fail("cu_seqlens_q[0] must be 0, got " + std::to_string(b.cu_seqlens_q[0]));
  int32_t max_page = -1;
  for (int32_t i = 0; i < b.batch; ++i) {
    const int32_t q_len = b.cu_seqlens_q[i + 1] - b.cu_seqlens_q[i];
    if (q_len < 0)
      fail("cu_seqlens_q must not decrease: " + at("cu_seqlens_q", i) + " = " + std::to_string(b.cu_seqlens_q[i]) +
           " but " + at("cu_seqlens_q", i + 1) + " = " + std::to_string(b.cu_seqlens_q[i + 1]));
    if (static_cast<int64_t>(q_len) * config.group > INT32_MAX / 2)
      fail("request " + std::to_string(i) + " has " + std::to_string(q_len) + " query tokens x group " +
           std::to_string(config.group) + ": more packed rows than an int32 holds");
    const int32_t kv_len = b.seqused_k[i];
    if (kv_len < 0) fail(at("seqused_k", i) + " must not be negative, got " + std::to_string(kv_len));
    if (kv_len > INT32_MAX / 2) fail(at("seqused_k", i) + " = " + std::to_string(kv_len) + " is more than 2^30 - 1 keys");
    const int32_t pages = static_cast<int32_t>((static_cast<int64_t>(kv_len) + config.page_size - 1) / config.page_size);
    if (pages > b.max_pages)
      fail(at("seqused_k", i) + " = " + std::to_string(kv_len) + " needs " + std::to_string(pages) + " pages of " +
           std::to_string(config.page_size) + " tokens, but block_table has " + std::to_string(b.max_pages) + " columns");
    const int32_t* row = b.block_table + i * b.block_table_stride;
    int32_t bits = 0, high = -1;  // a branch-free scan: the common case is that all is well
    for (int32_t p = 0; p < pages; ++p) {
      bits |= row[p];  // negative if one of them is
      high = std::max(high, row[p]);
    }
    if (bits < 0) {
      const int32_t p = static_cast<int32_t>(std::find_if(row, row + pages, [](int32_t x) { return x < 0; }) - row);
      fail("block_table[" + std::to_string(i) + ", " + std::to_string(p) + "] = " + std::to_string(row[p]) +
           " is no page, but " + at("seqused_k", i) + " = " + std::to_string(kv_len) + " needs it");
    }
    max_page = std::max(max_page, high);
  }
  return max_page;
}

}  // namespace

void make_plan(const PlanConfig& config, const Batch& b, Plan& plan) {
  const int32_t max_page = check(config, b);

  // Unsorted items go to a scratch list per thread (its memory is kept), then a stable counting sort places them.
  thread_local std::vector<WorkItem> scratch;
  thread_local std::vector<int32_t> keys;
  scratch.clear();
  keys.clear();
  plan.merges.clear();
  int32_t histogram[2 * kPlanBuckets] = {};
  int32_t partial_rows = 0, num_prefill = 0;
  for (int32_t i = 0; i < b.batch; ++i) {
    const int32_t q_begin = b.cu_seqlens_q[i], q_len = b.cu_seqlens_q[i + 1] - q_begin, kv_len = b.seqused_k[i];
    const RequestTiles tiles = request_tiles(config, q_len);
    const int32_t tile_class = tiles.prefill ? kPrefillTile : kDecodeTile;
    for (int32_t row = 0; row < tiles.rows; row += tiles.height) {
      const int32_t count = std::min(tiles.height, tiles.rows - row);
      const KeyRange keys_seen = visible_keys(config, q_len, kv_len, row, count);
      const int32_t num_splits = num_splits_of(keys_seen, tiles.split);
      WorkItem item{i, row, count, 0, 0, q_begin, q_len, kv_len, tile_class, -1, -1, 0};
      if (num_splits > 1) {
        item.merge_index = static_cast<int32_t>(plan.merges.size());
        if (static_cast<int64_t>(partial_rows) + static_cast<int64_t>(num_splits) * count > INT32_MAX)
          fail("the batch needs more than 2^31 partial rows; use a larger split");
        plan.merges.push_back({i, row, count, q_begin, q_len, kv_len, partial_rows, num_splits});
      }
      for (int32_t s = 0; s < num_splits; ++s) {
        const KeyRange range = split_range(keys_seen, tiles.split, num_splits, s);
        item.kv_begin = range.begin;
        item.kv_end = range.end;
        item.split_index = s;
        if (num_splits > 1) {
          item.partial_row = partial_rows;
          partial_rows += count;
        }
        const int key = sort_key(tiles.prefill, item.kv_end - item.kv_begin);
        ++histogram[key];
        keys.push_back(key);
        scratch.push_back(item);
      }
      if (tiles.prefill) num_prefill += num_splits;
    }
  }

  int32_t offset = 0;
  for (int32_t& h : histogram) {
    const int32_t n = h;
    h = offset;
    offset += n;
  }
  plan.items.resize(scratch.size());
  for (size_t i = 0; i < scratch.size(); ++i) plan.items[histogram[keys[i]]++] = scratch[i];
  plan.counts = {static_cast<int32_t>(plan.items.size()), num_prefill, static_cast<int32_t>(plan.merges.size()), partial_rows};
  plan.total_q = b.batch > 0 ? b.cu_seqlens_q[b.batch] : 0;
  plan.max_page = max_page;
}

}  // namespace sarathi
