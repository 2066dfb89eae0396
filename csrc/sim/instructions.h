// sm_80 instructions that PTX defines over a whole warp or in time: cp.async, ldmatrix, mma. Semantics from the PTX ISA
// manual, sections "Data Movement: asynchronous copy", "ldmatrix" and "Matrix fragments for mma.m16n8k16".
#pragma once
#include "sim/machine.h"
#include "sim/memory.h"

namespace sarathi::sim {

// cp.async: `size` bytes to shared memory, of which `bytes` come from `from` and the rest are zeros.
void cp_async(uint32_t shared, const void* from, uint32_t size, uint32_t bytes, Site site);
void cp_async_commit(Site site);
void land(PendingCopy& copy);                        // writes the bytes, once
std::vector<PendingCopy> take_copies(Thread& t);     // all that it has under way: it no longer waits for them
void cp_async_wait(int pending_groups, Site site);   // -1: everything, also what was not committed

// ldmatrix.sync.aligned.m8n8.x{count}[.trans].b16: lane l receives in r[i] two neighbours of row l/4 of matrix i
// (of its transpose with .trans); lanes 8i .. 8i+7 give the row addresses of matrix i.
void ldmatrix(uint32_t* r, uint32_t shared, int count, bool transposed, Site site);

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32, d += a b.
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site);

}  // namespace sarathi::sim
