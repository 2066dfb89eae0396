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
  return static_cast<int64_t>(row.page) * static_cast<int32_t>(stride_page) + static_cast<int64_t>(row.slot) * static_cast<int32_t>(stride_slot);
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a shared-memory tile: chunks are permuted within the row so that
// the eight rows ldmatrix reads at once lie in different banks. For an even number 2 d of chunks further on, flip its bits in
// the result: swizzled(row, 2 d + c) = swizzled(row, c) ^ 32 d, which costs one instruction and no register.
template <int kHeadDim>
SARATHI_HD constexpr int swizzled(int row, int chunk) {
  static_assert(kHeadDim % 64 == 0, "a row is a whole number of 128-byte lines");
  return row * kHeadDim * 2 + ((chunk ^ (row & 7)) << 4);
}

}  // namespace sarathi
