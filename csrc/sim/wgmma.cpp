// wgmma: each warp of a warpgroup computes its 16 rows of m64nNk16, when the scheduler says, at the latest when it waits.
#include <cstring>

#include "sim/hopper.h"
#include "sim/memory.h"

namespace sarathi::sim {
namespace {

struct Descriptor {
  uint32_t start, leading, stride;
  Swizzle swizzle;
};

Descriptor decode(uint64_t d, const char* which) {
  const auto field = [d](int bit) { return static_cast<uint32_t>(d >> bit & 0x3fff) << 4; };
  const Descriptor x{field(0), field(16), field(32), static_cast<Swizzle>(d >> 62)};
  if (d >> 49 & 7) fail("bad_operand", std::string("wgmma descriptor of ") + which + ": a base offset is not simulated");
  const uint32_t atom =
      x.swizzle == Swizzle::k128 ? 0x380 : x.swizzle == Swizzle::k64 ? 0x180 : x.swizzle == Swizzle::k32 ? 0x80 : 0;
  if (x.start & atom)
    fail("bad_operand", std::string("wgmma descriptor of ") + which + ": it starts at shared byte " +
        std::to_string(x.start - kSharedBase) +
                            ", within the rows of a swizzle pattern, with base offset 0");
  return x;
}

// Shared address of the 16 bytes that hold element (mn, k) and its neighbours: eight of k (K-major) or of mn (MN-major).
// The canonical layouts of the manual, in bytes, W chunks of 16 to the swizzle's span:
//   K-major    ((8, m), (8, 2))     : ((16 W, stride), (2, 16))          without swizzle ((16, stride), (2, leading))
//   MN-major   ((8, W, m), (8, 2))  : ((2, 16, leading), (16 W, stride)) without swizzle ((2, stride), (16, leading))
uint32_t chunk_address(const Descriptor& x, bool mn_major, int mn, int k) {
  const int chunks = x.swizzle == Swizzle::k128 ? 8 : x.swizzle == Swizzle::k64 ? 4 : x.swizzle == Swizzle::k32 ? 2 : 1;
  uint32_t offset;
  if (!mn_major)
    offset = mn % 8 * 16 * chunks + mn / 8 * x.stride + k / 8 * (chunks == 1 ? x.leading : 16);
  else if (chunks == 1)
    offset = mn / 8 * x.stride + k % 8 * 16 + k / 8 * x.leading;
  else
    offset = mn / 8 % chunks * 16 + mn / 8 / chunks * x.leading + k % 8 * 16 * chunks + k / 8 * x.stride;
  return swizzled(x.start + offset, x.swizzle);
}

// Visits the 16-byte chunks of rows [first, first + rows) of an operand: visit(address, mn, k) of the chunk's first element.
template <typename Visit>
void each_chunk(const Descriptor& x, bool mn_major, int first, int rows, Visit visit) {
  if (mn_major) {
    for (int mn = first; mn < first + rows; mn += 8)
      for (int k = 0; k < 16; ++k) visit(chunk_address(x, true, mn, k), mn, k);
  } else {
    for (int mn = first; mn < first + rows; ++mn)
      for (int k = 0; k < 16; k += 8) visit(chunk_address(x, false, mn, k), mn, k);
  }
}

float widen(uint16_t bits, bool bfloat16) { return bfloat16 ? float_from_bfloat16(bits) : float_from_half(bits); }

// to[k][mn - first]
template <int kRows>
void gather(const char* smem, const Descriptor& x, bool mn_major, bool bfloat16, int first, int rows, float (*to)[kRows]) {
  each_chunk(x, mn_major, first, rows, [&](uint32_t address, int mn, int k) {
    uint16_t values[8];
    std::memcpy(values, smem + address - kSharedBase, 16);
    for (int i = 0; i < 8; ++i) to[mn_major ? k : k + i][mn - first + (mn_major ? i : 0)] = widen(values[i], bfloat16);
  });
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply_add(const float (*a)[16], const float (*b)[256], float (*c)[256], int n) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) {
      const float x = a[k][i];
      for (int j = 0; j < n; ++j) c[i][j] += x * b[k][j];
    }
}

void run(Warp& warp, WgmmaOperand& op) {
  if (op.done) return;
  op.done = true;
  static float a[16][16], b[16][256], c[16][256];  // [k][row], [k][column], [row][column]; one launch at a time
  const char* smem = warp.cta->smem;
  const int first_row = warp.index % 4 * 16;
  if (op.a_in_registers) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
          a[lane % 4 * 2 + half + (i >> 1) * 8][lane / 4 +
              (i & 1) * 8] = widen(static_cast<uint16_t>(op.a[lane][i] >> 16 * half), op.bfloat16);
  } else {
    gather(smem, decode(op.descriptor_a, "A"), op.mn_major_a, op.bfloat16, first_row, 16, a);
  }
  gather(smem, decode(op.descriptor_b, "B"), op.mn_major_b, op.bfloat16, 0, op.n, b);
  // d[i] of a lane: row lane / 4 (+ 8 for the second pair), columns 8 (i / 4) + 2 (lane % 4) and the next.
  const auto each_element = [&](auto visit) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < op.n / 2; ++i) visit(op.d[lane][i], c[lane / 4 + (i >> 1 & 1) * 8][i / 4 * 8 + lane % 4 * 2 + (i & 1)]);
  };
  each_element([&](float& d, float& x) { x = op.accumulate ? d : 0.0f; });
  multiply_add(a, b, c, op.n);
  each_element([](float& d, float& x) { d = x; });
  machine.stats.mma_flops += 2ull * 16 * op.n * 16;
}

// Everything issued so far: they add to the same registers, so the order stays.
void run_all(Warp& warp, WgmmaQueue& queue) {
  for (auto& group : queue.groups)
    for (auto& op : group) run(warp, *op);
  for (auto& op : queue.open) run(warp, *op);
}

// Calls what(offset) for the 16-byte chunks of shared memory that this warp's share reads.
template <typename What>
void each_read(const Warp& warp, const WgmmaOperand& op, What what) {
  const auto visit = [&](uint32_t address, int, int) { what(address); };
  if (!op.a_in_registers) each_chunk(decode(op.descriptor_a, "A"), op.mn_major_a, warp.index % 4 * 16, 16, visit);
  each_chunk(decode(op.descriptor_b, "B"), op.mn_major_b, 0, op.n, visit);
}

struct IssueOperand { const WgmmaOperand* shared; float* d; const uint32_t* a; };

void issue(Warp& warp, uint32_t, void* const* operands) {
  Hopper* h = warp.cta->hopper.get();
  if (h == nullptr) fail("launch", "wgmma in a launch for sm_" + std::to_string(machine.config.arch));
  if (warp.index / 4 * 4 + 4 > static_cast<int>(warp.cta->warps.size())) fail("bad_operand",
      "wgmma in a warpgroup of fewer than four warps");
  auto op = std::make_unique<WgmmaOperand>(*static_cast<IssueOperand*>(operands[0])->shared);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<IssueOperand*>(operands[lane]);
    if (mine.shared->descriptor_a != op->descriptor_a || mine.shared->descriptor_b != op->descriptor_b ||
        mine.shared->accumulate != op->accumulate)
      fail("divergence", "lanes of a warp give wgmma different descriptors");
    op->d[lane] = mine.d;
    if (op->a_in_registers) std::memcpy(op->a[lane], mine.a, sizeof op->a[lane]);
  }
  WgmmaQueue& queue = h->wgmma[warp.index];
  if (!queue.fenced) fail("race", "wgmma without a wgmma.fence since the registers could last be touched");
  // The four warps execute the same wgmma, each in its own time.
  const uint64_t digest = (op->a_in_registers ? 0 : op->descriptor_a) * 31 + op->descriptor_b * 17 +
      static_cast<uint64_t>(op->n) * 4 + op->accumulate * 2 + op->bfloat16;
  auto& log = h->wgmma_log[warp.index / 4];
  if (queue.issued == log.size()) log.push_back(digest);
  else if (log[queue.issued] != digest) fail("divergence", "wgmma number " + std::to_string(queue.issued) +
      " differs between the warps of a warpgroup");
  ++queue.issued;
  Thread& reader = warp.threads[0];
  each_read(warp, *op, [&](uint32_t address) {
    const char* what = "wgmma operand";
    shared_pointer(address, 16, 16, what);
    if (warp.cta->races) {
      const Site site = reader.site;
      reader.site = op->site;
      warp.cta->races->begin_async_read(reader, address - kSharedBase, 16);
      reader.site = site;
    }
  });
  queue.open.push_back(std::move(op));
  if (machine.config.completion == Completion::kEager || (machine.config.completion == Completion::kRandom &&
      random_below(2) == 0)) run_all(warp, queue);
}

void fence(Warp& warp, uint32_t, void* const*) {
  if (!warp.cta->hopper) fail("launch", "wgmma.fence in a launch for sm_" + std::to_string(machine.config.arch));
  warp.cta->hopper->wgmma[warp.index].fenced = true;
}

void commit(Warp& warp, uint32_t, void* const*) {
  WgmmaQueue& queue = warp.cta->hopper->wgmma[warp.index];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void wait(Warp& warp, uint32_t, void* const* operands) {
  const int keep = *static_cast<int*>(operands[0]);
  WgmmaQueue& queue = warp.cta->hopper->wgmma[warp.index];
  RaceChecker* races = warp.cta->races.get();
  bool any = false;
  while (static_cast<int>(queue.groups.size()) > keep) {
    for (auto& op : queue.groups.front()) {
      run(warp, *op);
      any = true;
      if (races != nullptr) each_read(warp, *op, [&](uint32_t address) { races->finish_async_read(warp.threads[0],
          address - kSharedBase, 16); });
    }
    queue.groups.pop_front();
  }
  if (!any) return;
  queue.fenced = false;
  if (races == nullptr) return;
  // All lanes know now that the reads are over.
  Gathered gathered;
  races->release(warp.threads[0], gathered);
  const Knowledge knowledge = gathered.take(races->num_agents());
  for (int lane = 1; lane < kWarpSize; ++lane) races->acquire(warp.threads[lane], knowledge);
}

}  // namespace

void wgmma(const WgmmaOperand& shared, float* d, const uint32_t* a, Site site) {
  IssueOperand operand{&shared, d, a};
  warp_collective("wgmma", 0xffffffffu, &operand, issue, site);
}

void wgmma_fence(Site site) { warp_collective("wgmma.fence", 0xffffffffu, nullptr, fence, site); }
void wgmma_commit(Site site) { warp_collective("wgmma.commit_group", 0xffffffffu, nullptr, commit, site); }
void wgmma_wait(int pending_groups, Site site) { warp_collective("wgmma.wait_group", 0xffffffffu, &pending_groups, wait, site); }

}  // namespace sarathi::sim
