// mbarriers, and the queue of what is under way by itself.
#include <cstring>

#include "sim/hopper.h"
#include "sim/instructions.h"
#include "sim/memory.h"

namespace sarathi::sim {

// ---- asynchronous work ----

void start_async(AsyncOp op) {
  if (machine.config.completion == Completion::kEager)
    op.run();
  else
    machine.async_ops.push_back(std::move(op));
}

bool complete_async() {
  auto& ops = machine.async_ops;
  if (ops.empty()) return false;
  const size_t which = machine.config.completion == Completion::kRandom ? random_below(static_cast<uint32_t>(ops.size())) : 0;
  const AsyncOp op = std::move(ops[which]);
  ops.erase(ops.begin() + static_cast<ptrdiff_t>(which));
  progress();
  op.run();
  return true;
}

Hopper::Hopper(Cta& cta) : wgmma(cta.warps.size()), wgmma_log((cta.warps.size() + 3) / 4), registers(cta.warps.size()) {
  // What ptxas would give each thread when __launch_bounds__ names the block: an equal share, by eights, 255 at most. The
  // pool from which setmaxnreg takes holds only what others of the CTA gave back.
  const int warps = static_cast<int>(cta.warps.size()), share = 65536 / kWarpSize / warps;
  const int each = machine.config.registers_per_thread > 0 ? machine.config.registers_per_thread : std::min(255, share / 8 * 8);
  for (int& r : registers) r = each;
}

void check_retired(Cta& cta) {
  for (const AsyncOp& op : machine.async_ops)
    if (op.cta == &cta) fail("race", "block " + std::to_string(cta.linear_index) + " ended while " + op.what +
        " was under way, started at " + describe(op.site));
  if (!cta.hopper) return;
  const Hopper& h = *cta.hopper;
  for (const auto& [thread, groups] : h.store_groups)
    if (!groups.empty()) fail("race", "thread " + std::to_string(thread) +
        " ended without waiting for its bulk stores to read shared memory");
  for (const auto& [thread, stores] : h.open_stores)
    if (!stores.empty()) fail("race", "thread " + std::to_string(thread) + " ended with a bulk store that it never committed");
  for (size_t w = 0; w < h.wgmma.size(); ++w) {
    if (!h.wgmma[w].open.empty() || !h.wgmma[w].groups.empty())
      fail("race", "warp " + std::to_string(w) + " ended without waiting for its wgmma");
    if (h.wgmma[w].issued != h.wgmma_log[w / 4].size())
      fail("divergence", "warp " + std::to_string(w) + " took part in " + std::to_string(h.wgmma[w].issued) + " of the " +
                             std::to_string(h.wgmma_log[w / 4].size()) + " wgmma of its warpgroup");
  }
}

// ---- mbarrier ----

namespace {

constexpr uint32_t kMagic = 0x4D424152;

Hopper& hopper() {
  if (!self().cta->hopper) fail("launch", "an sm_90 instruction in a launch for sm_" + std::to_string(machine.config.arch));
  return *self().cta->hopper;
}

// The barrier at a shared address; its eight bytes must be as mbarrier.init left them.
Mbarrier& find(uint32_t bar, const char* what) {
  Hopper& h = hopper();
  const char* bytes = shared_pointer(bar, 8, 8, what);
  const uint32_t offset = bar - kSharedBase;
  uint32_t words[2];
  std::memcpy(words, bytes, 8);
  const auto found = h.mbarriers.find(offset);
  if (found == h.mbarriers.end() || words[0] != (kMagic ^ offset))
    fail("bad_operand", std::string(what) + ": there is no mbarrier at shared byte " + std::to_string(offset) +
                            (found == h.mbarriers.end() ? "" : " any more: it was overwritten"));
  // Its initialisation is a write like others: whoever uses it must be ordered after it.
  Thread& t = self();
  if (t.cta->races) t.cta->races->read(t, offset, 8);
  return found->second;
}

void settle(Cta& cta, Mbarrier& b) {
  if (b.pending > 0 || b.tx != 0) return;
  progress();
  ++b.phase;
  b.pending = b.count;
  if (cta.races) {
    b.gathered.add(b.agent, b.phase);
    b.completed = b.gathered.take(cta.races->num_agents());
  }
  for (Thread* t : b.waiting) wake(*t);
  b.waiting.clear();
}

void arrive(Cta& cta, Mbarrier& b, uint32_t offset) {
  if (b.pending == 0) fail("bad_operand", "one arrival too many on the mbarrier at shared byte " + std::to_string(offset) +
      " (count " + std::to_string(b.count) + ")");
  --b.pending;
  settle(cta, b);
}

}  // namespace

void mbarrier_init(uint32_t bar, int count, Site site) {
  enter(site);
  if (count < 1 || count >= 1 << 20) fail("bad_operand", "mbarrier.init with count " + std::to_string(count));
  Hopper& h = hopper();
  Thread& t = self();
  char* bytes = shared_pointer(bar, 8, 8, "mbarrier.init");
  const uint32_t offset = bar - kSharedBase, words[2] = {kMagic ^ offset, static_cast<uint32_t>(count)};
  if (t.cta->races) t.cta->races->write(t, offset, 8);
  std::memcpy(bytes, words, 8);
  const int agent = h.mbarriers.count(offset) ? h.mbarriers[offset].agent : static_cast<int>(h.mbarriers.size());
  if (agent >= RaceChecker::kAsyncAgents) fail("bad_operand", "more than " + std::to_string(RaceChecker::kAsyncAgents) +
      " mbarriers in a CTA");
  Mbarrier& b = h.mbarriers[offset];
  b.count = b.pending = count;
  b.tx = 0;
  b.phase = 0;
  b.agent = static_cast<int>(t.cta->threads.size()) + agent;
}

void mbarrier_arrive(uint32_t bar, int expect_bytes, Site site) {
  enter(site);
  Mbarrier& b = find(bar, "mbarrier.arrive");
  Thread& t = self();
  if (t.cta->races) t.cta->races->release(t, b.gathered);
  b.tx += expect_bytes;
  if (b.tx >= 1 << 20) fail("bad_operand", "an mbarrier expects " + std::to_string(b.tx) + " bytes; 2^20 - 1 is the most");
  arrive(*t.cta, b, bar - kSharedBase);
}

bool mbarrier_test(uint32_t bar, int parity, Site site) {
  enter(site);
  Mbarrier& b = find(bar, "mbarrier.try_wait");
  if ((b.phase & 1) == static_cast<uint32_t>(parity & 1)) {
    poll("mbarrier", static_cast<int>(bar - kSharedBase));
    return false;
  }
  Thread& t = self();
  if (t.cta->races && b.completed) t.cta->races->acquire(t, b.completed);
  return true;
}

void mbarrier_wait(uint32_t bar, int parity, Site site) {
  enter(site);
  Thread& t = self();
  Mbarrier& b = find(bar, "mbarrier.try_wait");
  while ((b.phase & 1) == static_cast<uint32_t>(parity & 1)) {
    b.waiting.push_back(&t);
    block("mbarrier at shared byte", static_cast<int>(bar - kSharedBase));
  }
  if (t.cta->races && b.completed) t.cta->races->acquire(t, b.completed);
}

void cp_async_mbarrier_arrive(uint32_t bar, Site site) {
  enter(site);
  Thread& t = self();
  Mbarrier* b = &find(bar, "cp.async.mbarrier.arrive");
  std::vector<PendingCopy> copies = take_copies(t);
  // What the thread did so far is part of the arrival; its copies become writes of the barrier's agent when they land.
  auto gathered = std::make_shared<Gathered>();
  if (t.cta->races) t.cta->races->release(t, *gathered);
  Cta* cta = t.cta;
  start_async({cta, "cp.async.mbarrier.arrive", site, [cta, b, bar, copies, gathered]() mutable {
                 for (PendingCopy& copy : copies) {
                   land(copy);
                   if (cta->races) cta->races->finish_copy(b->agent, b->phase + 1, static_cast<uint32_t>(copy.to - cta->smem),
                       copy.size, true);
                 }
                 if (cta->races) b->gathered.add(gathered->take(cta->races->num_agents()));
                 arrive(*cta, *b, bar - kSharedBase);
               }});
}

void mbarrier_fence_init(Site site) {
  enter(site);
  Thread& t = self();
  if (!t.cta->races) return;
  std::vector<uint32_t> offsets;
  for (const auto& entry : hopper().mbarriers) offsets.push_back(entry.first);
  t.cta->races->fence_proxy(t, &offsets);
}

void fence_proxy_async(Site site) {
  enter(site);
  Thread& t = self();
  if (t.cta->races) t.cta->races->fence_proxy(t);
}

// The barrier's transaction count, for copies that land on it.
void complete_tx(Cta& cta, Mbarrier& b, int64_t bytes) {
  b.tx -= bytes;
  settle(cta, b);
}

Mbarrier& mbarrier_for_copy(uint32_t bar) {
  Mbarrier& b = find(bar, "bulk copy's mbarrier");
  Thread& t = self();
  if (t.cta->races) t.cta->races->check_fenced(t, bar - kSharedBase, 8, "starts a bulk copy on an mbarrier");
  return b;
}

bool elect(Site site) {
  struct Operand { int leader; } operand{-1};
  warp_collective("elect", 0xffffffffu, &operand, [](Warp& warp, uint32_t mask, void* const* operands) {
    // Always the same lane of a mask; which one is the hardware's affair.
    const int leader = machine.config.seed == 0 ? __builtin_ctz(mask) : static_cast<int>(machine.config.seed * 7 % kWarpSize);
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1)
        static_cast<Operand*>(operands[lane])->leader = warp.members >> leader & 1 ? leader : __builtin_ctz(mask);
  }, site);
  return operand.leader == self().lane;
}

void set_registers(int registers, bool increase, Site site) {
  const char* const name = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  static constexpr WarpWork kNothing = [](Warp&, uint32_t, void* const*) {};
  warp_collective(name, 0xffffffffu, nullptr, kNothing, site);
  Hopper& h = hopper();
  Thread& t = self();
  int& mine = h.registers[t.warp->index];
  if (registers < 24 || registers > 256 || registers % 8 != 0) fail("bad_operand", std::string(name) + " to " +
      std::to_string(registers) + ": 24 to 256, by eights");
  if (t.lane == 0) {
    if (increase ? registers < mine : registers > mine)
      fail("bad_operand", std::string(name) + " to " + std::to_string(registers) + " from " + std::to_string(mine));
    while (registers - mine > h.free_registers) poll("registers that setmaxnreg.inc waits for", registers);
    h.free_registers -= registers - mine;
    mine = registers;
    progress();
  }
  warp_collective(name, 0xffffffffu, nullptr, kNothing, site);
}

}  // namespace sarathi::sim
