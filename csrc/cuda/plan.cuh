// The planner on the device: bit for bit the tables of csrc/plan.cpp, with no copy to the host and no wait for it. One CTA
// and one launch: a step of a few hundred requests is a few thousand items, and four passes over them cost less than the
// launches that would spread them.
//
//     requests -> running count of tiles -> tiles: splits, merge items, totals, histogram of sort keys -> items, each to its place
//
// The counting sort must be stable, so places are handed out in item order: block of threads by block, in it warp by warp,
// in the warp lane by lane. Values are trusted, as nothing can be raised here.
#pragma once
#include <cstring>

#include "ptx.cuh"
#include "work.cuh"

namespace sarathi::planner {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kKeys = 2 * kPlanBuckets;

struct Shared {
  int64_t warp_sums[3][kWarps];
  int32_t histogram[kKeys];           // items of each sort key
  int32_t warp_count[kWarps][kKeys];  // of the items that a warp places now, those of each key
  int32_t warp_first[kWarps][kKeys];  // where the first of them goes
};

// One tile of query rows.
struct TileOf { int32_t request, row_begin, row_count, q_begin, q_len, kv_len, split, num_splits; KeyRange keys; bool prefill; };
SARATHI_HD TileOf tile_of(const PlanParams& p, int32_t request, int32_t index_in_request) {
  TileOf t{};
  t.request = request;
  t.q_begin = p.cu_seqlens_q[request];
  t.q_len = p.cu_seqlens_q[request + 1] - t.q_begin;
  t.kv_len = p.seqused_k[request];
  const RequestTiles tiles = request_tiles(p.config, t.q_len);
  t.row_begin = index_in_request * tiles.height;
  t.row_count = tiles.rows - t.row_begin < tiles.height ? tiles.rows - t.row_begin : tiles.height;
  t.keys = visible_keys(p.config, t.q_len, t.kv_len, t.row_begin, t.row_count);
  t.split = tiles.split;
  t.num_splits = num_splits_of(t.keys, t.split);
  t.prefill = tiles.prefill;
  return t;
}

// A row of the scratch table `tiles`: what the item pass needs to know of a tile beyond its requests' lengths.
struct alignas(16) TileRow { int32_t request, first_item, merge_index, partial_row; };

// Rows of the tables are written 16 bytes at a time; they all begin at multiples of 16 bytes.
template <typename Row>
__device__ __forceinline__ void store_row(Row* to, const Row& row) {
  static_assert(sizeof(Row) % 16 == 0);
  int4 words[sizeof(Row) / 16];
  memcpy(words, &row, sizeof row);
#pragma unroll
  for (unsigned i = 0; i < sizeof(Row) / 16; ++i) ptx::st_global(reinterpret_cast<int4*>(to) + i, words[i]);
}

// The last i in [0, n) with begin(i) <= x; begin(0) <= x.
template <typename Begin>
__device__ __forceinline__ int32_t search(int32_t n, int32_t x, Begin begin) {
  int32_t low = 0, high = n;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (begin(middle) <= x) low = middle;
    else high = middle;
  }
  return low;
}

// Exclusive sums of three values over the CTA's threads in order; `total` takes in the CTA's sums.
struct Triple { int64_t x[3]; };
__device__ __forceinline__ Triple exclusive_sums(Shared& shared, const Triple& own, Triple& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Triple sums = own;
  for (int k = 0; k < 3; ++k) {
    for (int delta = 1; delta < 32; delta *= 2) {
      const int64_t below = ptx::shfl_up(sums.x[k], delta);
      if (lane >= delta) sums.x[k] += below;
    }
    if (lane == 31) ptx::st_shared(&shared.warp_sums[k][warp], sums.x[k]);
  }
  __syncthreads();
  for (int k = 0; k < 3; ++k) {
    int64_t before = total.x[k];
    for (int w = 0; w < kWarps; ++w) {
      const int64_t sum = ptx::ld_shared(&shared.warp_sums[k][w]);
      if (w < warp) before += sum;
      total.x[k] += sum;
    }
    sums.x[k] += before - own.x[k];
  }
  __syncthreads();  // the sums are written again by the next call
  return sums;
}

// tile_begin[i] = tiles of the requests before i. Returns the number of tiles.
__device__ __forceinline__ int32_t count_tiles(const PlanParams& p, Shared& shared) {
  Triple total{};
  for (int32_t start = 0; start < p.batch; start += kThreads) {
    const int32_t i = start + static_cast<int32_t>(threadIdx.x);
    Triple own{};
    if (i < p.batch) {
      const RequestTiles tiles = request_tiles(p.config, p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i]);
      own.x[0] = ceil_div(tiles.rows, tiles.height);
    }
    const Triple before = exclusive_sums(shared, own, total);
    if (i < p.batch) ptx::st_global(p.tile_begin + i, static_cast<int32_t>(before.x[0]));
  }
  __syncthreads();
  return static_cast<int32_t>(total.x[0]);
}

// Tile rows, merge items and the histogram of sort keys. Returns the numbers of items, merges and partial rows; what lies
// beyond the tables' capacity is counted and not written.
__device__ __forceinline__ Triple lay_out_tiles(const PlanParams& p, Shared& shared, int32_t num_tiles) {
  Triple total{};
  for (int32_t start = 0; start < num_tiles; start += kThreads) {
    const int32_t index = start + static_cast<int32_t>(threadIdx.x);
    TileOf t{};
    Triple own{};
    if (index < num_tiles) {
      const int32_t request = search(p.batch, index, [&](int32_t i) { return ptx::ld_global(p.tile_begin + i); });
      t = tile_of(p, request, index - ptx::ld_global(p.tile_begin + request));
      own.x[0] = t.num_splits;
      own.x[1] = t.num_splits > 1 ? 1 : 0;
      own.x[2] = t.num_splits > 1 ? static_cast<int64_t>(t.num_splits) * t.row_count : 0;
      // All splits but the first and the last are of full length.
      for (int s = 0; s < t.num_splits && s < 2; ++s) {
        const KeyRange range = split_range(t.keys, t.split, t.num_splits, s == 0 ? 0 : t.num_splits - 1);
        ptx::atomic_add(&shared.histogram[sort_key(t.prefill, range.end - range.begin)], 1);
      }
      if (t.num_splits > 2) ptx::atomic_add(&shared.histogram[sort_key(t.prefill, t.split)], t.num_splits - 2);
    }
    const Triple before = exclusive_sums(shared, own, total);
    if (own.x[1] && before.x[1] < p.max_merges)
      store_row(p.merge_items + before.x[1], MergeItem{t.request, t.row_begin, t.row_count, t.q_begin, t.q_len, t.kv_len,
                                                            static_cast<int32_t>(before.x[2]), t.num_splits});
    if (index < num_tiles && index < p.max_items)
      store_row(reinterpret_cast<TileRow*>(p.tiles) + index,
                TileRow{t.request, static_cast<int32_t>(before.x[0]), own.x[1] ? static_cast<int32_t>(before.x[1]) : -1,
                             own.x[1] ? static_cast<int32_t>(before.x[2]) : -1});
  }
  __syncthreads();
  return total;
}

// Thread k learns where the first item of key k goes. Returns the number of prefill items, whose keys come first.
__device__ __forceinline__ int32_t offsets_of_keys(Shared& shared, int32_t& first_place) {
  static_assert(kKeys <= kThreads);
  const int key = threadIdx.x;
  Triple own{}, total{};
  if (key < kKeys) own.x[0] = ptx::ld_shared(&shared.histogram[key]);
  if (key < kPlanBuckets) own.x[1] = own.x[0];
  first_place = static_cast<int32_t>(exclusive_sums(shared, own, total).x[0]);
  return static_cast<int32_t>(total.x[1]);
}

// Lanes of the warp whose key is this lane's; none when the lane has no item.
__device__ __forceinline__ uint32_t lanes_with_key(int32_t key, bool has_item) {
  uint32_t lanes = ptx::ballot(has_item);
  for (int bit = 1; bit < kKeys; bit *= 2) {
    const uint32_t set = ptx::ballot((key & bit) != 0);
    lanes &= key & bit ? set : ~set;
  }
  return has_item ? lanes : 0;
}

// next_place: thread k's, where the next item of key k goes.
__device__ __forceinline__ void place_items(const PlanParams& p, Shared& shared, int32_t num_items, int32_t num_tiles,
                                            int32_t next_place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto* tiles = reinterpret_cast<const TileRow*>(p.tiles);
  for (int32_t start = 0; start < num_items; start += kThreads) {
    // Clearing the counts is safe: all have passed the barrier behind their last use.
    for (int i = threadIdx.x; i < kWarps * kKeys; i += kThreads) ptx::st_shared(&shared.warp_count[0][0] + i, 0);
    __syncthreads();
    const int32_t index = start + static_cast<int32_t>(threadIdx.x);
    const bool has_item = index < num_items;
    WorkItem item{};
    int32_t key = 0;
    if (has_item) {
      const int32_t tile = search(num_tiles, index, [&](int32_t i) { return ptx::ld_global(&tiles[i].first_item); });
      const TileRow row = ptx::ld_global(tiles + tile);
      const TileOf t = tile_of(p, row.request, tile - ptx::ld_global(p.tile_begin + row.request));
      const int32_t s = index - row.first_item;
      const KeyRange range = split_range(t.keys, t.split, t.num_splits, s);
      item = {t.request, t.row_begin, t.row_count, range.begin, range.end, t.q_begin, t.q_len, t.kv_len,
              t.prefill ? kPrefillTile : kDecodeTile, row.partial_row < 0 ? -1 : row.partial_row + s * t.row_count,
              row.merge_index, s};
      key = sort_key(t.prefill, range.end - range.begin);
    }
    const uint32_t peers = lanes_with_key(key, has_item), below = peers & ((1u << lane) - 1);
    if (has_item && below == 0) ptx::st_shared(&shared.warp_count[warp][key], __popc(peers));
    __syncthreads();
    if (threadIdx.x < kKeys)
      for (int w = 0; w < kWarps; ++w) {
        ptx::st_shared(&shared.warp_first[w][threadIdx.x], next_place);
        next_place += ptx::ld_shared(&shared.warp_count[w][threadIdx.x]);
      }
    __syncthreads();
    if (has_item) store_row(p.work_items + ptx::ld_shared(&shared.warp_first[warp][key]) + __popc(below), item);
  }
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  auto& shared = *ptx::dynamic_smem<Shared>();
  for (int k = threadIdx.x; k < kKeys; k += kThreads) ptx::st_shared(&shared.histogram[k], 0);
  __syncthreads();
  const int32_t num_tiles = count_tiles(p, shared);
  const Triple total = lay_out_tiles(p, shared, num_tiles);
  const bool fits = total.x[0] <= p.max_items && total.x[1] <= p.max_merges && total.x[2] <= p.max_partial_rows;
  int32_t first_place;
  const int32_t num_prefill = offsets_of_keys(shared, first_place);
  if (fits) place_items(p, shared, static_cast<int32_t>(total.x[0]), num_tiles, first_place);
  if (threadIdx.x == 0)
    store_row(p.counts, fits ? PlanCounts{static_cast<int32_t>(total.x[0]), num_prefill, static_cast<int32_t>(total.x[1]),
                                               static_cast<int32_t>(total.x[2])}
                                  : PlanCounts{-1, 0, 0, 0});
}

}  // namespace sarathi::planner
