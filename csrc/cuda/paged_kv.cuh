// Where a key lives. A row of head_dim elements is the unit of every load, so pages of any size serve.
#pragma once
#include "work.cuh"

namespace sarathi {

struct alignas(8) PagedRow { int32_t page, slot; };

SARATHI_HD PagedRow locate(const int32_t* pages, int32_t page_size, int32_t key) {
  return {pages[key / page_size], key % page_size};
}

// Element offset of the row within the cache: 64 bits, as a cache may hold more than 2^31 elements. No single stride may
// (the caller checks), which makes each product one instruction.
SARATHI_HD int64_t row_offset(PagedRow row, int64_t stride_page, int64_t stride_slot) {
  return static_cast<int64_t>(row.page) * static_cast<int32_t>(stride_page) +
         static_cast<int64_t>(row.slot) * static_cast<int32_t>(stride_slot);
}

}  // namespace sarathi
