#include "sim/machine.h"

#include <algorithm>
#include <climits>
#include <map>

#include "sim/hopper.h"
#include "sim/memory.h"
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

// ---- collectives ----

// The gathering that this lane joins, when it is not simply the one that the lanes before it opened.
Gathering& open_gathering(const char* name, uint32_t mask, Site site) {
  const Thread& t = self();
  Warp& warp = *t.warp;
  const uint32_t bit = 1u << t.lane;
  if ((mask & bit) == 0) fail("divergence", std::string(name) + " with a mask that leaves out the calling lane");
  if (mask & warp.finished) fail("divergence", std::string(name) + " waits for lanes that have exited");
  Gathering* free = nullptr;
  for (Gathering& g : warp.gatherings) {
    if (g.mask == 0) {
      if (free == nullptr) free = &g;
    } else if (g.mask == mask) {
      if (g.name == name) return g;
      fail("divergence", std::string(name) + " while other lanes of the warp are in " + g.name + " at " + describe(g.site));
    } else if (g.mask & bit) {
      fail("divergence", std::string(name) + ": another lane's " + g.name + " at " + describe(g.site) + " expects this lane");
    }
  }
  if (free == nullptr) fail("divergence", "more than four partial warp collectives at once");
  free->name = name;
  free->mask = mask;
  free->arrived = 0;
  free->site = site;
  return *free;
}

namespace {

// `last` is the thread whose arrival completes it, when it also waits.
void complete(Cta& cta, Barrier& b, int id, Thread* last) {
  ++machine.stats.barriers;
  progress();
  // bar.sync is a warp-wide instruction: lanes of one warp that meet in it from different places have diverged.
  std::vector<const Site*> first(cta.warps.size(), nullptr);
  for (const auto& [t, site] : b.arrivals) {
    const Site*& f = first[t->warp->index];
    if (f == nullptr) f = &site;
    if (f->line != site.line || f->file != site.file)
      fail("divergence", "lanes of warp " + std::to_string(t->warp->index) + " reach barrier " + std::to_string(id) +
                             " from different places: " + describe(*f) + " and " + describe(site));
  }
  for (const auto& arrival : b.arrivals) arrival.first->stores.move_to(cta.stores);
  if (cta.races) {
    const Knowledge knowledge = b.gathered->take(cta.races->num_agents());
    for (Thread* t : b.waiting) cta.races->acquire(*t, knowledge);
    if (last != nullptr) cta.races->acquire(*last, knowledge);
  }
  for (Thread* t : b.waiting) wake(*t);
  b.expected = b.arrived = 0;
  b.waiting.clear();
  b.arrivals.clear();
}

}  // namespace

void barrier(int id, int threads, bool wait, Site site) {
  enter(site);
  Thread& t = self();
  Cta& cta = *t.cta;
  if (id < 0 || id >= kNamedBarriers) fail("bad_operand", "barrier " + std::to_string(id) + ": there are 16");
  const bool whole_cta = threads == 0;
  if (!whole_cta && threads % kWarpSize != 0)
    fail("bad_operand", "barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads: must be whole warps");
  if (threads > static_cast<int>(cta.threads.size()))
    fail("bad_operand", "barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads in a CTA of " +
                            std::to_string(cta.threads.size()));
  Barrier& b = cta.barriers[id];
  const int expected = whole_cta ? static_cast<int>(cta.threads.size()) : threads;
  if (b.arrived == 0) {
    b.expected = expected;
    b.whole_cta = whole_cta;
  } else if (b.expected != expected || b.whole_cta != whole_cta) {
    fail("divergence", "barrier " + std::to_string(id) + ": this thread expects " + std::to_string(expected) +
                           " threads, the first arrival expected " + std::to_string(b.expected));
  }
  ++b.arrived;
  b.arrivals.emplace_back(&t, site);
  if (cta.races) cta.races->release(t, *b.gathered);
  const int target = b.whole_cta ? cta.live_threads : b.expected;
  if (b.arrived == target) {
    complete(cta, b, id, wait ? &t : nullptr);
  } else if (wait) {
    b.waiting.push_back(&t);
    block("barrier", id);
  }
}

void sync_warp(Warp& warp, uint32_t mask, void* const*) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].stores.move_to(warp.cta->stores);
  RaceChecker* races = warp.cta->races.get();
  if (races == nullptr) return;
  Gathered gathered;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) races->release(warp.threads[__builtin_ctz(rest)], gathered);
  const Knowledge knowledge = gathered.take(races->num_agents());
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) races->acquire(warp.threads[__builtin_ctz(rest)], knowledge);
}

// ---- reports ----

std::string report_waiting() {
  // One line per kind of wait: the same thing in the same place is said once, with a count and the first thread.
  struct Line { int count; const Thread* first; };
  std::map<std::string, Line> lines;
  for (const auto& cta : machine.slots) {
    if (!cta) continue;
    for (const Thread& t : cta->threads) {
      const bool ready = t.warp->ready >> t.lane & 1;
      if (t.finished || (ready && !t.polling)) continue;
      std::string what = t.waits_for;
      if (t.waits_on >= 0) what += " " + std::to_string(t.waits_on);
      if (what.compare(0, 8, "barrier ") == 0) {
        const Barrier& b = cta->barriers[t.waits_on];
        what += " (" + std::to_string(b.arrived) + " of " + std::to_string(b.whole_cta ? cta->live_threads : b.expected) + " arrived)";
      }
      what += " at " + describe(t.site);
      auto& line = lines.try_emplace(what, Line{0, &t}).first->second;
      ++line.count;
    }
  }
  std::string report;
  for (const auto& [what, line] : lines)
    report += "  " + std::to_string(line.count) + " threads wait for " + what + ", first " + describe(*line.first) + "\n";
  return report;
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
  // A thread that exits counts as arrived in every later __syncthreads, also in one that is under way.
  for (int id = 0; id < kNamedBarriers; ++id) {
    Barrier& b = cta.barriers[id];
    if (b.arrived > 0 && b.whole_cta && b.arrived == cta.live_threads) complete(cta, b, id, nullptr);
  }
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
  if (c.grid.y > 65535 || c.grid.z > 65535) fail("launch", "grid (y, z) = (" + text(c.grid.y) + ", " + text(c.grid.z) + "), at most 65535");
  if (c.smem_bytes > max_smem(c.arch))
    fail("launch", text(c.smem_bytes) + " bytes of dynamic shared memory; sm_" + text(c.arch) + " has " + text(max_smem(c.arch)) + " per CTA");
  // An SM holds one KiB more than the largest CTA may ask for, and every CTA costs one KiB of it.
  const size_t per_sm = max_smem(c.arch) + 1024;
  if (c.ctas_per_sm * (c.smem_bytes + 1024) > per_sm && c.ctas_per_sm > 1)
    fail("launch", text(c.ctas_per_sm) + " CTAs of " + text(c.smem_bytes) + " bytes do not fit the " + text(per_sm) + " bytes of an SM");
  if (c.ctas_per_sm * threads > 2048) fail("launch", text(c.ctas_per_sm) + " CTAs of " + text(threads) + " threads on an SM of 2048");
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
  ++machine.stats.ctas;
  return cta;
}

void retire(Cta& cta) {
  check_retired(cta);
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
