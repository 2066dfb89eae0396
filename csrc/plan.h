// The host planner: requests -> work items + merge items, the same table for every backend.
#pragma once
#include <cstdint>
#include <vector>

#include "params.h"
#include "plan_math.h"

namespace sarathi {

struct Batch {
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* seqused_k;     // [batch]
  const int32_t* block_table;   // [batch, max_pages]
  int64_t block_table_stride;
  int32_t batch;
  int32_t max_pages;
};

struct Plan {
  std::vector<WorkItem> items;
  std::vector<MergeItem> merges;
  PlanCounts counts{};
  int32_t total_q = 0;
  int32_t max_page = -1;   // largest page id a kernel will touch; the op holds it against num_pages
};

// Throws std::invalid_argument, with the offending values, before anything is written to `plan`.
void make_plan(const PlanConfig& config, const Batch& batch, Plan& plan);

}  // namespace sarathi
