// One table of kernels per instruction set, each compiled from the same sources (CMakeLists.txt), and the choice among them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace sarathi {

struct Kernels {
  const char* name;
  // Whether one visit of this item takes several kv heads at a time; if not, visits are cheapest one head at a time.
  bool (*streams)(const AttentionParams&, const WorkItem&);
  // Bytes of scratch (64-byte aligned) that `visit` and `merge` need.
  size_t (*scratch_bytes)(const AttentionParams&);
  void (*visit)(const AttentionParams&, const WorkItem&, int32_t head_begin, int32_t head_end, char* scratch);
  void (*merge)(const AttentionParams&, const MergeItem&, int32_t kv_head, char* scratch);
  void (*append_kv)(const AppendKvParams&, int32_t token_begin, int32_t token_end);
  void (*merge_states)(const MergeParams&, int64_t row_begin, int64_t row_end, char* scratch);
};

// Fastest last; only those that this CPU and operating system can run.
std::vector<const Kernels*> available_isas();

// The kernels in use: the last available, unless the environment variable SARATHI_CPU_ISA or set_isa named another.
const Kernels& kernels();

// Throws std::invalid_argument, naming those available, if `name` is not one of them. Not to be called during an op.
void set_isa(const std::string& name);

}  // namespace sarathi
