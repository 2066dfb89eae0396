#include "cpu.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "thread_pool.h"

namespace sarathi::cpu {
namespace {

// Below this much memory traffic, waking another thread costs more than it saves.
constexpr int64_t kBytesPerThread = 128 << 10;

// Units of work, in the plan's order (longest first): (prefill item, kv head), then (decode item, some kv heads).
struct AttentionQueue {
  const AttentionParams& p;
  const Kernels& k;
  int32_t head_parts;  // in how many parts a decode item's kv heads are visited
  int64_t prefill_units, units;
  std::atomic<int64_t> next{0};

  void visit(const WorkItem& item, int32_t head_begin, int32_t head_end, char* scratch) {
    k.visit(p, item, head_begin, head_end, scratch);
    if (item.merge_index < 0) return;
    const MergeItem& merge = p.merge_items[item.merge_index];
    for (int32_t head = head_begin; head < head_end; ++head) {
      int32_t* arrived = p.counters + static_cast<int64_t>(item.merge_index) * p.num_kv_heads + head;
      // Whoever arrives last combines the splits, in split order: the bits do not depend on who that is.
      if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) == merge.num_splits) {
        k.merge(p, merge, head, scratch);
        *arrived = 0;
      }
    }
  }

  void drain() {
    char* scratch = thread_scratch(k.scratch_bytes(p));
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      if (unit < prefill_units) {
        const int32_t head = static_cast<int32_t>(unit % p.num_kv_heads);
        visit(p.work_items[unit / p.num_kv_heads], head, head + 1, scratch);
      } else {
        const int64_t decode = unit - prefill_units, part = decode % head_parts;
        const int32_t begin = static_cast<int32_t>(part * p.num_kv_heads / head_parts);
        const int32_t end = static_cast<int32_t>((part + 1) * p.num_kv_heads / head_parts);
        visit(p.work_items[p.num_prefill_items + decode / head_parts], begin, end, scratch);
      }
    }
  }
};

// Splits [0, n) into chunks that threads draw.
template <class Body>
struct Chunks {
  int64_t n, chunk;
  const Body& body;
  std::atomic<int64_t> next{0};

  void drain() {
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < n;) body(begin, std::min(n, begin + chunk));
  }
};

template <class Queue>
void drain_on_threads(Queue& queue, int threads) {
  run_on_threads(threads, [](void* q) { static_cast<Queue*>(q)->drain(); }, &queue);
}

template <class Body>
void for_chunks(int64_t n, int64_t bytes_each, int threads, const Body& body) {
  const int64_t useful = n * bytes_each / kBytesPerThread;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(useful, 1)));
  Chunks<Body> chunks{n, std::max<int64_t>(1, (n + 4 * threads - 1) / (4 * threads)), body};
  if (threads == 1) chunks.chunk = n;
  if (n > 0) drain_on_threads(chunks, threads);
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 || dtype == DType::kFloat8E4M3 ? 1 : 2; }

}  // namespace

void attention(const AttentionParams& p, int threads) {
  const Kernels& k = kernels();
  const int32_t decodes = p.num_items - p.num_prefill_items;
  int32_t parts = p.num_kv_heads;
  if (decodes > 0 && k.streams(p, p.work_items[p.num_prefill_items])) parts = std::clamp(4 * threads / decodes, 1, p.num_kv_heads);
  const int64_t prefill_units = static_cast<int64_t>(p.num_prefill_items) * p.num_kv_heads;
  AttentionQueue queue{p, k, parts, prefill_units, prefill_units + static_cast<int64_t>(decodes) * parts};
  drain_on_threads(queue, static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(queue.units, 1))));
}

void append_kv(const AppendKvParams& p, int threads) {
  const Kernels& k = kernels();
  const int64_t bytes = static_cast<int64_t>(2 * p.num_kv_heads + (p.q ? p.num_q_heads : 0)) * p.head_dim * 2 * size_of(p.dtype);
  for_chunks(p.total_q, bytes, threads, [&](int64_t begin, int64_t end) {
    k.append_kv(p, static_cast<int32_t>(begin), static_cast<int32_t>(end));
  });
}

void merge_states(const MergeParams& p, int threads) {
  const Kernels& k = kernels();
  for_chunks(p.rows, (p.num_states + 1) * p.head_dim * size_of(p.dtype), threads, [&](int64_t begin, int64_t end) {
    k.merge_states(p, begin, end, thread_scratch(p.head_dim * sizeof(float)));
  });
}

}  // namespace sarathi::cpu
