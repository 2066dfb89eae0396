// Linear layers on the pool's threads.
#include "linear.h"

#include <algorithm>
#include <atomic>

#include "thread_pool.h"

namespace sarathi::cpu {
namespace {

constexpr int64_t kRowBlockBytes = 800 << 10;  // prepared rows that stay in a core's L2 while its share of the outputs passes by

// Rows are prepared first, where that is more than to read them.
struct Rows {
  static constexpr int32_t kChunk = 16;
  const LinearParams& p;
  const Panel& panel;
  std::atomic<int32_t> next{0};

  void drain() {
    for (int32_t begin; (begin = next.fetch_add(kChunk, std::memory_order_relaxed)) < p.rows;)
      avx512vnni::prepare(p, panel, begin, std::min(p.rows, begin + kChunk));
  }
};

// Then units of (rows, 32 outputs) are shared out. Each thread streams a range of its own, in which no other thread's stride
// interrupts the prefetchers; who is done helps in the others' ranges.
struct Units {
  static constexpr int kRanges = 64;
  const LinearParams& p;
  const Panel& panel;
  int32_t row_blocks, ranges;
  std::atomic<int32_t> arrived{0};
  std::atomic<int32_t> next[kRanges] = {};  // within each range

  void drain() {
    const int32_t mine = arrived.fetch_add(1, std::memory_order_relaxed), blocks = p.n / 32;
    for (int32_t i = 0; i < ranges; ++i) {
      const int32_t range = (mine + i) % ranges, begin = begin_of(range), end = begin_of(range + 1);
      for (int32_t unit; (unit = begin + next[range].fetch_add(1, std::memory_order_relaxed)) < end;)
        avx512vnni::multiply(p, panel, begin_of_rows(unit / blocks), begin_of_rows(unit / blocks + 1), unit % blocks);
    }
  }
  int32_t begin_of(int32_t range) const { return static_cast<int32_t>(static_cast<int64_t>(p.n / 32) * row_blocks * range / ranges); }
  int32_t begin_of_rows(int32_t block) const { return static_cast<int32_t>(static_cast<int64_t>(p.rows) * block / row_blocks); }
};

template <class Work>
void drain_on_threads(Work&& work, int threads) {
  run_on_threads(threads, [](void* w) { static_cast<Work*>(w)->drain(); }, &work);
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  if (p.rows == 0) return;
  threads = std::min(threads, Units::kRanges);
  const Panel panel = avx512vnni::panel_of(p, thread_scratch(avx512vnni::scratch_bytes(p)));
  if (!panel.in_place) drain_on_threads(Rows{p, panel}, p.rows > 2 * Rows::kChunk ? threads : 1);
  const int32_t row_blocks = static_cast<int32_t>((p.rows * panel.row_bytes + kRowBlockBytes - 1) / kRowBlockBytes);
  drain_on_threads(Units{p, panel, row_blocks, threads}, threads);
}

bool has_linear() {
#if defined(SARATHI_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if !defined(SARATHI_X86)
namespace avx512vnni {
size_t scratch_bytes(const LinearParams&) { return 0; }
Panel panel_of(const LinearParams&, char*) { return {}; }
void prepare(const LinearParams&, const Panel&, int32_t, int32_t) {}
void multiply(const LinearParams&, const Panel&, int32_t, int32_t, int32_t) {}
}  // namespace avx512vnni
#endif

}  // namespace sarathi::cpu
