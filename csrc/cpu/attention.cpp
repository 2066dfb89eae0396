// attention() for one ISA: chooses the kernel of a work item, and the kernel's types.
//
//     rows <= kStreamRows of whole vectors: stream_kernel.h, bound by bandwidth       all others: tile_kernel.h
#include "stream_kernel.h"
#include "tile_kernel.h"
#include "variant.h"

namespace sarathi::SARATHI_ISA {
namespace {

template <class T, class KV, class Tile, class Stream>
void visit_item(const AttentionParams& p, const WorkItem& item, int32_t head_begin, int32_t head_end, char* scratch) {
  if (item.row_count <= kStreamRows && stream_takes<Stream>(p.head_dim)) return visit_stream<T, KV, Stream>(p, item, head_begin, head_end, scratch);
  for (int32_t head = head_begin; head < head_end; ++head)
    for (int32_t row = 0; row < item.row_count; row += kTileRows)
      visit_tile<T, KV, Tile>(p, item, head, item.row_begin + row, min_of(kTileRows, item.row_count - row), scratch);
}

#if defined(__AVX512BF16__)
using Bf16Compute = Bf16Dot;
#else
using Bf16Compute = Fma;
#endif

#if defined(SARATHI_AMX) || defined(SARATHI_AMX_EMULATED)
// The tile kernel's compute type where head_dim is whole steps of the tiles.
using Bf16Tile = AmxDot;
bool on_tiles(const AttentionParams& p) { return p.head_dim % kTileKeys == 0; }
#else
using Bf16Tile = Bf16Compute;
bool on_tiles(const AttentionParams&) { return false; }
#endif

bool is_bf16_dot(const AttentionParams& p) { return p.dtype == DType::kBFloat16 && p.kv_dtype == DType::kBFloat16; }

}  // namespace

bool streams(const AttentionParams& p, const WorkItem& item) {
  const bool whole = is_bf16_dot(p) ? stream_takes<Bf16Compute>(p.head_dim) : stream_takes<Fma>(p.head_dim);
  return item.row_count <= kStreamRows && whole;
}

size_t scratch_bytes(const AttentionParams& p) {
  const size_t tile = TileScratch(nullptr, p.head_dim).bytes, stream = StreamScratch(nullptr, p.num_kv_heads, kStreamRows, p.head_dim).bytes;
  return max_of(tile, stream);
}

void visit(const AttentionParams& p, const WorkItem& item, int32_t head_begin, int32_t head_end, char* scratch) {
  const bool int8 = p.kv_dtype == DType::kInt8;
  switch (p.dtype) {
    case DType::kFloat32:
      return (int8 ? visit_item<float, int8_t, Fma, Fma> : visit_item<float, float, Fma, Fma>)(p, item, head_begin, head_end, scratch);
    case DType::kBFloat16:
      if (on_tiles(p))
        return (int8 ? visit_item<Bf16, int8_t, Bf16Tile, Fma> : visit_item<Bf16, Bf16, Bf16Tile, Bf16Compute>)(p, item, head_begin, head_end, scratch);
      return (int8 ? visit_item<Bf16, int8_t, Bf16Compute, Fma>
                   : visit_item<Bf16, Bf16, Bf16Compute, Bf16Compute>)(p, item, head_begin, head_end, scratch);
    case DType::kFloat16:
      return (int8 ? visit_item<Half, int8_t, Fma, Fma> : visit_item<Half, Half, Fma, Fma>)(p, item, head_begin, head_end, scratch);
    default: __builtin_trap();  // the adapter's `supports` admits no other
  }
}

}  // namespace sarathi::SARATHI_ISA
