// The CPU backend's three ops: work handed to the pool's threads, kernels from the chosen ISA's table.
#pragma once
#include "../params.h"

namespace sarathi::cpu {

void attention(const AttentionParams& params, int threads);
void append_kv(const AppendKvParams& params, int threads);
void merge_states(const MergeParams& params, int threads);

}  // namespace sarathi::cpu
