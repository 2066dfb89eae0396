// What each ISA's objects define, and their table. SARATHI_ISA is the namespace: generic, avx2, avx512, avx512bf16, amx or
// amx_emulated.
#pragma once
#include "isa.h"

namespace sarathi::SARATHI_ISA {

bool streams(const AttentionParams&, const WorkItem&);                                                          // attention.cpp
size_t scratch_bytes(const AttentionParams&);
void visit(const AttentionParams&, const WorkItem&, int32_t head_begin, int32_t head_end, char* scratch);
void merge(const AttentionParams&, const MergeItem&, int32_t kv_head, char* scratch);                           // merge.cpp
void merge_states(const MergeParams&, int64_t row_begin, int64_t row_end, char* scratch);
void append_kv(const AppendKvParams&, int32_t token_begin, int32_t token_end);                                  // append_kv.cpp

}  // namespace sarathi::SARATHI_ISA
