#include "sim/instructions.h"

#include <cstring>

#include "sim/profile.h"
#include "sim/races.h"

namespace sarathi::sim {
namespace {

constexpr uint32_t kFullMask = 0xffffffffu;

// In random mode each copy that is still on its way lands now with probability 1/2.
void land_some(std::vector<PendingCopy>& copies) {
  for (PendingCopy& copy : copies)
    if (random_below(2) == 0) land(copy);
}

void finish(Thread& t, std::vector<PendingCopy>& copies) {
  for (PendingCopy& copy : copies) {
    land(copy);
    if (t.cta->races) t.cta->races->finish_copy(t.index, t.count, static_cast<uint32_t>(copy.to - t.cta->smem), copy.size, true);
  }
  copies.clear();
}

}  // namespace

// When that happens is up to the simulator; the copy is under way until the thread has waited for it.
void land(PendingCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
  machine.stats.global_to_shared_bytes += copy.bytes;
}

std::vector<PendingCopy> take_copies(Thread& t) {
  std::vector<PendingCopy> all;
  for (const auto& group : t.copy_groups) all.insert(all.end(), group.begin(), group.end());
  all.insert(all.end(), t.open_copies.begin(), t.open_copies.end());
  t.copy_groups.clear();
  t.open_copies.clear();
  return all;
}

void cp_async(uint32_t shared, const void* from, uint32_t size, uint32_t bytes, Site site) {
  enter(site);
  if (bytes > size) fail("bad_operand", "cp.async of " + std::to_string(size) + " bytes with a source of " +
      std::to_string(bytes));
  char* to = shared_pointer(shared, size, size, "cp.async destination");
  if (bytes > 0) {
    if (reinterpret_cast<uintptr_t>(from) % size != 0)
      fail("misaligned", "cp.async source is not a multiple of " + std::to_string(size));
    if (machine.config.check_global) global_memory().check(from, bytes, false, "cp.async source");
  }
  profile_access(Access::kCopyDestination, shared, size);
  if (bytes > 0) profile_access(Access::kCopySource, reinterpret_cast<uintptr_t>(from), bytes);
  Thread& t = self();
  PendingCopy copy{to, static_cast<const char*>(from), size, bytes, false};
  if (t.cta->races) t.cta->races->begin_copy(t, static_cast<uint32_t>(to - t.cta->smem), size);
  if (machine.config.completion == Completion::kEager) land(copy);
  t.open_copies.push_back(copy);
}

void cp_async_commit(Site site) {
  enter(site);
  Thread& t = self();
  if (machine.config.completion == Completion::kRandom) {
    land_some(t.open_copies);
    for (auto& group : t.copy_groups) land_some(group);
  }
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}

void cp_async_wait(int pending_groups, Site site) {
  enter(site);
  Thread& t = self();
  const size_t keep = pending_groups < 0 ? 0 : static_cast<size_t>(pending_groups);
  if (t.copy_groups.size() > keep) {
    const auto end = t.copy_groups.end() - static_cast<ptrdiff_t>(keep);
    for (auto group = t.copy_groups.begin(); group != end; ++group) finish(t, *group);
    t.copy_groups.erase(t.copy_groups.begin(), end);
  }
  if (pending_groups < 0) finish(t, t.open_copies);
  progress();
}

// ---- ldmatrix ----

namespace {

struct LdmatrixOperand { uint32_t* r; uint32_t shared; int count; bool transposed; };

void run_ldmatrix(Warp& warp, uint32_t, void* const* operands) {
  const auto lane = [&](int l) -> const LdmatrixOperand& { return *static_cast<LdmatrixOperand*>(operands[l]); };
  const int count = lane(0).count;
  const bool transposed = lane(0).transposed;
  Thread* const last = machine.running;
  for (int m = 0; m < count; ++m) {
    uint16_t matrix[8][8];
    int rows_in_bank_group[8] = {};  // a row of 16 bytes covers four of the 32 banks
    uint32_t seen[8];
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = lane(m * 8 + row).shared;
      // The address came from that lane: it is the reader, and a fault is reported in its name.
      Thread& reader = warp.threads[m * 8 + row];
      machine.running = &reader;
      std::memcpy(matrix[row], shared_pointer(address, 16, 16, "ldmatrix row"), 16);
      if (warp.cta->races) warp.cta->races->read(reader, address - kSharedBase, 16);
      seen[row] = address;
      bool repeated = false;  // two lanes with one address share the access
      for (int other = 0; other < row; ++other) repeated |= seen[other] == address;
      if (!repeated) ++rows_in_bank_group[address / 16 % 8];
    }
    int wavefronts = 1;
    for (const int rows : rows_in_bank_group) wavefronts = std::max(wavefronts, rows);
    machine.stats.ldmatrix_wavefronts += wavefronts;
    machine.stats.ldmatrix_conflicts += wavefronts - 1;
    machine.stats.shared_load_bytes += sizeof matrix;
    for (int l = 0; l < kWarpSize; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      lane(l).r[m] = low | high << 16;
    }
  }
  machine.running = last;
}

}  // namespace

void ldmatrix(uint32_t* r, uint32_t shared, int count, bool transposed, Site site) {
  LdmatrixOperand operand{r, shared, count, transposed};
  warp_collective(transposed ? "ldmatrix.trans" : "ldmatrix", kFullMask, &operand, run_ldmatrix, site);
}

// ---- mma ----

namespace {

struct MmaOperand { float* d; const uint32_t* a; uint32_t b[2]; bool bfloat16; };

using Row = float __attribute__((vector_size(32)));  // the eight columns of one row of b, c and d

// Products of 16-bit floats are exact in float32; they are added to the accumulator in order of k. (Hardware adds them
// in another order and with its own rounding: results agree to float32 accuracy, not in bits.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply_add(const float (*a)[16], const Row* b, Row* c) {
  for (int i = 0; i < 16; i += 4) {  // four rows at once: independent chains of additions
    Row c0 = c[i], c1 = c[i + 1], c2 = c[i + 2], c3 = c[i + 3];
    for (int k = 0; k < 16; ++k) {
      c0 += a[i][k] * b[k];
      c1 += a[i + 1][k] * b[k];
      c2 += a[i + 2][k] * b[k];
      c3 += a[i + 3][k] * b[k];
    }
    c[i] = c0;
    c[i + 1] = c1;
    c[i + 2] = c2;
    c[i + 3] = c3;
  }
}

template <float (*Convert)(uint16_t)>
void run_mma(Warp&, uint32_t, void* const* operands) {
  float a[16][16];
  Row b[16], c[16];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& o = *static_cast<MmaOperand*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {  // a0, a1: rows group, group + 8 of columns 0-7; a2, a3: of columns 8-15
      const int row = group + (i & 1) * 8, column = pair + (i >> 1) * 8;
      a[row][column] = Convert(static_cast<uint16_t>(o.a[i]));
      a[row][column + 1] = Convert(static_cast<uint16_t>(o.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = Convert(static_cast<uint16_t>(o.b[i]));
      b[pair + i * 8 + 1][group] = Convert(static_cast<uint16_t>(o.b[i] >> 16));
    }
    for (int i = 0; i < 4; ++i) c[group + (i >> 1) * 8][pair + (i & 1)] = o.d[i];
  }
  multiply_add(a, b, c);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& o = *static_cast<MmaOperand*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) o.d[i] = c[group + (i >> 1) * 8][pair + (i & 1)];
  }
  machine.stats.mma_flops += 2 * 16 * 8 * 16;
}

}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat16, Site site) {
  MmaOperand operand{d, a, {b0, b1}, bfloat16};
  if (bfloat16)
    warp_collective("mma.m16n8k16.bf16", kFullMask, &operand, run_mma<float_from_bfloat16>, site);
  else
    warp_collective("mma.m16n8k16.f16", kFullMask, &operand, run_mma<float_from_half>, site);
}

}  // namespace sarathi::sim
