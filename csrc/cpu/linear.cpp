// Linear layers: rows are prepared once, then threads draw tiles of outputs.
#include "linear.h"

#include <algorithm>
#include <atomic>

#include "thread_pool.h"

namespace sarathi::cpu {
namespace {

constexpr int32_t kRowBlock = 264;  // prepared rows that stay in a core's L2 while all outputs pass by; 22 tiles of 12

struct Queue {
  const LinearParams& p;
  char* values;
  float* scales;
  int32_t* sums;
  int32_t row_blocks, chunk, chunks;  // outputs are drawn `chunk` blocks of 32 at a time
  std::atomic<int32_t> next_rows{0}, next{0};

  static constexpr int32_t kPrepareRows = 16;

  void prepare() {
    for (int32_t begin; (begin = next_rows.fetch_add(kPrepareRows, std::memory_order_relaxed)) < p.rows;)
      avx512vnni::prepare(p, begin, std::min(p.rows, begin + kPrepareRows), values, scales, sums);
  }

  void multiply() {
    for (int32_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < row_blocks * chunks;) {
      const int32_t rows = unit / chunks * kRowBlock, block = unit % chunks * chunk;
      avx512vnni::multiply(p, rows, std::min(p.rows, rows + kRowBlock), block, std::min(p.n / 32, block + chunk), values, scales, sums);
    }
  }
};

}  // namespace

void linear(const LinearParams& p, int threads) {
  if (p.rows == 0) return;
  const size_t value_bytes = (static_cast<size_t>(p.rows) * p.k * (p.w_scale ? 1 : 2) + 63) / 64 * 64;
  char* scratch = thread_scratch(value_bytes + p.rows * (sizeof(float) + sizeof(int32_t)));
  const int32_t blocks = p.n / 32, row_blocks = (p.rows + kRowBlock - 1) / kRowBlock;
  const int32_t chunk = std::max(1, blocks / (8 * threads)), chunks = (blocks + chunk - 1) / chunk;
  float* scales = reinterpret_cast<float*>(scratch + value_bytes);
  Queue queue{p, scratch, scales, reinterpret_cast<int32_t*>(scales + p.rows), row_blocks, chunk, chunks};
  run_on_threads(p.rows > 64 ? threads : 1, [](void* q) { static_cast<Queue*>(q)->prepare(); }, &queue);
  run_on_threads(threads, [](void* q) { static_cast<Queue*>(q)->multiply(); }, &queue);
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
void prepare(const LinearParams&, int32_t, int32_t, char*, float*, int32_t*) {}
void multiply(const LinearParams&, int32_t, int32_t, int32_t, int32_t, const char*, const float*, const int32_t*) {}
}  // namespace avx512vnni
#endif

}  // namespace sarathi::cpu
