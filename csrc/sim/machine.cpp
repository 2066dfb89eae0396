#include "sim/machine.h"

#include <algorithm>
#include <climits>

#include "sim/hopper.h"
#include "sim/memory.h"
#include "sim/profile.h"
#include "sim/races.h"

namespace sarathi::sim {

Machine machine;
Machine::Machine() = default;
Machine::~Machine() = default;

Cta::Cta() {
  for (Barrier& b : barriers) b.gathered = std::make_unique<Gathered>();
}
Cta::~Cta() = default;

uint32_t random_below(uint32_t bound) {  // xorshift64*
  uint64_t& s = machine.random_state;
  s ^= s >> 12;
  s ^= s << 25;
  s ^= s >> 27;
  return static_cast<uint32_t>(((s * 0x2545F4914F6CDD1Dull) >> 32) * bound >> 32);
}

std::string describe(const Site& site) {
  if (site.file == nullptr) return "before any wrapper";
  const std::string file = site.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

std::string describe(const Thread& t) {
  const auto xyz = [](dim3 d) { return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z); };
  return "block (" + xyz(t.cta->block_idx) + ") thread (" + xyz(t.thread_idx) + ") warp " + std::to_string(t.warp->index) +
         " lane " + std::to_string(t.lane);
}

void fail(const char* kind, const std::string& message) {
  if (machine.running == nullptr) throw Error(kind, message);
  const Thread& t = self();
  if (!machine.error)
    machine.error = std::make_unique<Error>(kind, message + "\n  by " + describe(t) + " at " + describe(t.site));
  // The fiber is abandoned where it stands: kernels own nothing that needs a destructor.
  Fiber abandoned;
  switch_fiber(abandoned, machine.scheduler);
  std::abort();
}

// ---- switching ----

namespace {

void new_budget() {
  if (machine.config.seed == 0) {
    machine.budget = INT64_MAX;
    return;
  }
  // Mostly short stretches, sometimes long ones: both orders of a race get their chance.
  static constexpr uint32_t kStretch[] = {1, 8, 64, 512, 4096};
  machine.budget = random_below(kStretch[random_below(5)] * 2);
}

}  // namespace

void block(const char* waits_for, int on) {
  Thread& t = self();
  t.waits_for = waits_for;
  t.waits_on = on;
  t.warp->ready &= ~(1u << t.lane);
  leave(t);
}

void wake(Thread& t) { t.warp->ready |= 1u << t.lane; }

void preempt() {
  ++machine.stats.switches;
  self().warp->current = self().lane;
  switch_fiber(self().fiber, machine.scheduler);
}

void poll(const char* what, int on) {
  ++machine.stats.polls;
  Thread& t = self();
  t.waits_for = what;
  t.waits_on = on;
  t.polling = true;
  if (++machine.polls_since_progress > machine.config.livelock_polls)
    fail("livelock", std::string("polled ") + what + " " + std::to_string(machine.config.livelock_polls) +
                         " times while nothing else moved\n" + report_waiting());
  preempt();
  t.polling = false;
}

// ---- the launch ----

namespace {

void thread_main() {
  machine.kernel(machine.kernel_arguments);
  Thread& t = self();
  t.finished = true;
  t.stores.move_to(t.cta->stores);
  Warp& warp = *t.warp;
  Cta& cta = *t.cta;
  warp.finished |= 1u << t.lane;
  warp.ready &= ~(1u << t.lane);
  --cta.live_threads;
  progress();
  exit_barriers(cta);
  leave(t);
  std::abort();
}

size_t max_smem(int arch) {  // per CTA, opt-in
  switch (arch) {
    case 80: return 163 << 10;
    case 86: case 89: return 99 << 10;
    case 90: return 227 << 10;
  }
  fail("launch", "no limits known for arch " + std::to_string(arch) + "; there are 80, 86, 89, 90");
}

void check_launch(const Config& c) {
  const auto text = [](uint64_t v) { return std::to_string(v); };
  const uint64_t threads = static_cast<uint64_t>(c.block.x) * c.block.y * c.block.z;
  if (threads == 0 || threads > 1024) fail("launch", text(threads) + " threads per CTA; 1 to 1024 are possible");
  if (c.block.z > 64) fail("launch", "blockDim.z is " + text(c.block.z) + ", at most 64");
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0) fail("launch", "an empty grid");
  if (c.grid.y > 65535 || c.grid.z > 65535) fail("launch", "grid (y, z) = (" + text(c.grid.y) + ", " + text(c.grid.z) +
      "), at most 65535");
  if (c.smem_bytes > max_smem(c.arch))
    fail("launch", text(c.smem_bytes) + " bytes of dynamic shared memory; sm_" + text(c.arch) + " has " +
        text(max_smem(c.arch)) + " per CTA");
  // An SM holds one KiB more than the largest CTA may ask for, and every CTA costs one KiB of it.
  const size_t per_sm = max_smem(c.arch) + 1024;
  if (c.ctas_per_sm * (c.smem_bytes + 1024) > per_sm && c.ctas_per_sm > 1)
    fail("launch", text(c.ctas_per_sm) + " CTAs of " + text(c.smem_bytes) + " bytes do not fit the " + text(per_sm) +
        " bytes of an SM");
  if (c.ctas_per_sm * threads > 2048) fail("launch", text(c.ctas_per_sm) + " CTAs of " + text(threads) +
      " threads on an SM of 2048");
}

void empty_slot(std::unique_ptr<Cta>& slot) {
  if (!slot) return;
  for (Thread& t : slot->threads) machine.stacks.give(t.stack);
  slot = nullptr;
}

std::unique_ptr<Cta> make_cta(int64_t linear, int slot) {
  const Config& c = machine.config;
  auto cta = std::make_unique<Cta>();
  cta->linear_index = linear;
  cta->slot = slot;
  cta->sm = slot % c.num_sms;
  cta->block_idx = dim3(linear % c.grid.x, linear / c.grid.x % c.grid.y, linear / (static_cast<int64_t>(c.grid.x) * c.grid.y));
  const int n = c.block.x * c.block.y * c.block.z;
  cta->threads.resize(n);
  cta->warps.resize((n + kWarpSize - 1) / kWarpSize);
  cta->live_threads = n;
  cta->smem = shared_arena().take(slot, c.smem_bytes);
  for (int i = 0; i < n; ++i) {
    Thread& t = cta->threads[i];
    Warp& w = cta->warps[i / kWarpSize];
    t.cta = w.cta = cta.get();
    t.warp = &w;
    t.index = i;
    t.lane = i % kWarpSize;
    t.thread_idx = dim3(i % c.block.x, i / c.block.x % c.block.y, i / (c.block.x * c.block.y));
    w.index = i / kWarpSize;
    w.threads = &cta->threads[w.index * kWarpSize];
    w.members |= 1u << t.lane;
    w.ready = w.members;
    w.current = -1;
    t.stack = machine.stacks.take();
    // Tops of stacks are a multiple of the page size apart: staggered, so that 32 lanes do not fight for one cache set.
    t.fiber.prepare(t.stack, StackPool::kBytes - 192 * (i % 61), thread_main);
  }
  if (c.arch >= 90) cta->hopper = std::make_unique<Hopper>(*cta);
  if (c.check_races) cta->races = std::make_unique<RaceChecker>(*cta, c.smem_bytes);
  if (c.profile)
    for (Warp& w : cta->warps) w.profile = std::make_shared<WarpProfile>();
  ++machine.stats.ctas;
  return cta;
}

void retire(Cta& cta) {
  check_retired(cta);
  for (Warp& w : cta.warps)
    if (w.profile) w.profile->finish();
  cta.stores.move_to(machine.stores);
  for (int id = 0; id < kNamedBarriers; ++id)
    if (cta.barriers[id].arrived > 0)
      fail("deadlock", "a CTA ended with " + std::to_string(cta.barriers[id].arrived) + " of " +
                           std::to_string(cta.barriers[id].expected) + " arrivals on barrier " + std::to_string(id));
  shared_arena().check_canaries(cta);
}

// The next warp with a lane that can run: the one after the last in index order, or from a random place on.
Warp* choose_warp() {
  const dim3 block = machine.config.block;
  const auto& slots = machine.slots;
  const size_t per_cta = (block.x * block.y * block.z + kWarpSize - 1) / kWarpSize, total = slots.size() * per_cta;
  const size_t start = machine.config.seed == 0 ? machine.cursor + 1 : random_below(static_cast<uint32_t>(total));
  for (size_t i = 0; i < total; ++i) {
    const size_t at = (start + i) % total;
    Cta* cta = slots[at / per_cta].get();
    if (cta != nullptr && cta->warps[at % per_cta].ready != 0) {
      machine.cursor = at;
      return &cta->warps[at % per_cta];
    }
  }
  return nullptr;
}

void run_warp(Warp& warp) {
  int lane = 0;
  if (machine.config.seed == 0) {
    const uint32_t above = warp.current >= 31 ? 0 : warp.ready & (~0u << (warp.current + 1));
    lane = __builtin_ctz(above != 0 ? above : warp.ready);
  } else {
    lane = random_below(kWarpSize);
    while (!(warp.ready >> lane & 1)) lane = (lane + 1) % kWarpSize;
  }
  warp.current = lane;
  Thread& t = warp.threads[lane];
  new_budget();
  machine.running = &t;
  switch_fiber(machine.scheduler, t.fiber);
  machine.running = nullptr;
}

constexpr int64_t kPatience = 64;  // polls in a row

void run_all(int64_t num_ctas) {
  int64_t next = 0;
  int64_t live = 0;
  for (auto& slot : machine.slots)
    if (next < num_ctas) {
      slot = make_cta(next++, static_cast<int>(&slot - machine.slots.data()));
      ++live;
    }
  while (live > 0) {
    // Work that is under way by itself lands now and then, when threads only poll, and when nothing else can move.
    if (machine.config.completion == Completion::kRandom && random_below(4) == 0) complete_async();
    if (machine.polls_since_progress > kPatience) complete_async();
    Warp* warp = choose_warp();
    if (warp == nullptr && complete_async()) continue;
    if (warp == nullptr) fail("deadlock", "no thread can run\n" + report_waiting());
    Cta* cta = warp->cta;
    run_warp(*warp);
    if (machine.error) throw Error(*machine.error);
    if (cta->live_threads > 0) continue;
    retire(*cta);
    const int index = cta->slot;
    empty_slot(machine.slots[index]);
    if (next < num_ctas)
      machine.slots[index] = make_cta(next++, index);
    else
      --live;
  }
}

}  // namespace

Stats run_grid(const Config& config, void (*kernel)(void*), void* arguments) {
  check_launch(config);
  const int64_t num_ctas = static_cast<int64_t>(config.grid.x) * config.grid.y * config.grid.z;
  machine.config = config;
  machine.stats = {};
  machine.kernel = kernel;
  machine.kernel_arguments = arguments;
  machine.polls_since_progress = 0;
  machine.cursor = ~size_t{0};
  machine.error = nullptr;
  machine.stores = {};
  clear_profile();
  machine.async_ops.clear();
  machine.random_state = config.seed * 0x9E3779B97F4A7C15ull + 1;
  machine.slots.clear();
  machine.slots.resize(std::min<int64_t>(num_ctas, static_cast<int64_t>(config.num_sms) * config.ctas_per_sm));
  const FaultHandler faults;
  try {
    run_all(num_ctas);
  } catch (...) {
    for (auto& slot : machine.slots) empty_slot(slot);
    machine.slots.clear();
    throw;
  }
  machine.slots.clear();
  machine.stores.drain();
  return machine.stats;
}

}  // namespace sarathi::sim
