// The simulated GPU: CTAs, warps and threads as data, one launch at a time, and what a launch is told and reports.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/cuda_language.h"
#include "sim/fiber.h"

namespace sarathi::sim {

// When an asynchronous copy lands: as late as the waits allow, at once, or at a random moment in between.
enum class Completion { kLate, kEager, kRandom };

struct Config {
  dim3 grid, block;
  size_t smem_bytes = 0;                      // dynamic shared memory
  uint64_t seed = 0;                          // 0: in index order, each warp until it blocks; else a random interleaving
  Completion completion = Completion::kLate;
  int arch = 80;                              // decides the limits: 80, 86, 89, 90
  int num_sms = 4;
  int ctas_per_sm = 2;                        // CTAs alive at once = num_sms * ctas_per_sm, in index order
  int registers_per_thread = 0;               // for setmaxnreg; 0: an equal share of the SM's 64 Ki
  bool check_global = true;                   // wrappers may touch registered buffers only (memory.h)
  bool check_races = true;                    // happens-before over shared memory (races.h)
  bool profile = false;                       // bank conflicts and sectors by source line (profile.h)
  int64_t livelock_polls = 2000000;           // polls in a row without any progress of anybody before giving up
  int hang_seconds = 20;                      // CPU time that one thread may take from one wrapper to the next
};

// Totals over the launch. Bytes are those that pass through the wrappers: plain loads and stores cannot be seen.
struct Stats {
  uint64_t global_to_shared_bytes = 0;        // cp.async and TMA, without the zero fill
  uint64_t shared_to_global_bytes = 0;        // TMA stores
  uint64_t shared_load_bytes = 0;             // ldmatrix, ld_shared
  uint64_t shared_store_bytes = 0;            // st_shared
  uint64_t ldmatrix_wavefronts = 0;           // one per 8x8 matrix when no two of its rows share a bank
  uint64_t ldmatrix_conflicts = 0;            // wavefronts beyond that
  uint64_t mma_flops = 0;
  uint64_t barriers = 0;                      // CTA and named barriers completed
  uint64_t warp_collectives = 0;
  uint64_t atomics = 0;
  uint64_t polls = 0;
  uint64_t switches = 0;
  uint64_t ctas = 0;
};

// A fault of the simulated kernel. what() = "<kind>: <message>".
class Error : public std::runtime_error {
 public:
  Error(const char* kind, const std::string& message) : std::runtime_error(std::string(kind) + ": " + message), kind_(kind) {}
  const char* kind() const { return kind_; }

 private:
  const char* kind_;  // launch, out_of_bounds, misaligned, divergence, deadlock, livelock, hang, race, bad_operand
};

// Where in the kernel's source a wrapper was called: the default argument of every wrapper.
struct Site {
  constexpr Site(const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()) : file(file_), line(line_) {}
  const char* file;
  int line;
};

inline constexpr int kWarpSize = 32;
inline constexpr int kNamedBarriers = 16;
inline constexpr uint32_t kSharedBase = 1024;  // shared-window address of the first byte: 0 is never a valid address

struct Cta;
struct Warp;
class RaceChecker;
class Gathered;
class WarpProfile;
struct Hopper;
struct AsyncOp;

// Plain global stores (st_global) that the rest of the GPU need not see yet, by 4-byte word. Completion::kEager stores at
// once. Otherwise a thread's stores become visible to its CTA at the next barrier, and to everybody when a thread that
// can see them executes __threadfence or a releasing operation, or at the end of the launch.
class WeakStores {
 public:
  void store(void* address, const void* value, size_t bytes);
  void load(const void* address, void* value, size_t bytes) const;   // overwrites the bytes that are held here
  void forget(const void* address, size_t bytes);
  void move_to(WeakStores& other);
  void drain();                                                      // writes them to memory
  bool empty() const { return words_.empty(); }

 private:
  struct Word { uint32_t value = 0, mask = 0; };
  std::unordered_map<uintptr_t, Word> words_;
};

struct PendingCopy { char* to; const char* from; uint32_t size, bytes; bool landed; };  // `bytes` are read, the rest is zeros

struct Thread {
  Fiber fiber;
  char* stack = nullptr;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  dim3 thread_idx;
  int index = 0;                              // within the CTA
  int lane = 0;
  bool finished = false;
  void* operand = nullptr;                    // what it brought to the collective it waits in
  const char* waits_for = nullptr;            // of a thread that cannot run, or is polling
  bool polling = false;
  int waits_on = -1;                          // barrier number or shared address, for the report
  Site site{nullptr, 0};                      // the latest wrapper
  uint32_t count = 1;                         // synchronisations so far, and what it has seen of others (races.h)
  std::shared_ptr<const std::vector<uint32_t>> knowledge;
  WeakStores stores;
  std::vector<PendingCopy> open_copies;       // cp.async since the last commit
  std::vector<std::vector<PendingCopy>> copy_groups;
};

// Lanes gathered for one warp-wide instruction; lanes with different masks may gather at the same time.
struct Gathering { const char* name = nullptr; uint32_t mask = 0, arrived = 0; Site site{nullptr, 0}; };

struct Warp {
  Cta* cta = nullptr;
  int index = 0;                              // within the CTA
  uint32_t members = 0;                       // lanes that exist; the last warp may be short
  uint32_t ready = 0;                         // lanes that can run
  uint32_t finished = 0;
  Thread* threads = nullptr;                  // lane 0
  int current = 0;                            // lane at which the scheduler entered it last
  Gathering gatherings[4];
  void* operands[kWarpSize] = {};
  std::shared_ptr<WarpProfile> profile;       // null when the launch does not profile
};

struct Barrier {
  int expected = 0;                           // threads, fixed by the first to arrive; 0 = nobody is waiting
  int arrived = 0;
  bool whole_cta = false;                     // __syncthreads: also completes when the missing threads exit
  std::vector<Thread*> waiting;
  std::vector<std::pair<Thread*, Site>> arrivals;
  std::unique_ptr<Gathered> gathered;
};

struct Cta {
  dim3 block_idx;
  int64_t linear_index = 0;
  int slot = 0, sm = 0;
  char* smem = nullptr;
  int live_threads = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  WeakStores stores;                          // of threads that have passed a barrier since
  std::unique_ptr<RaceChecker> races;         // null when the launch does not check
  std::unique_ptr<Hopper> hopper;             // null before sm_90
  Cta();
  ~Cta();
};

struct Machine {
  Config config;
  Stats stats;
  Thread* running = nullptr;                  // null outside a launch and in the scheduler
  Fiber scheduler;
  StackPool stacks;
  void (*kernel)(void*) = nullptr;
  void* kernel_arguments = nullptr;
  std::vector<std::unique_ptr<Cta>> slots;    // the CTAs alive
  size_t cursor = 0;                          // warp that ran last, over all slots
  int64_t budget = 0;                         // wrapper calls until the scheduler is asked again
  int64_t polls_since_progress = 0;
  uint64_t random_state = 1;
  WeakStores stores;                          // of CTAs that have ended
  std::vector<AsyncOp> async_ops;             // under way by themselves (hopper.h), oldest first
  std::unique_ptr<Error> error;
  Machine();
  ~Machine();
};

extern Machine machine;
inline Thread& self() { return *machine.running; }

// Ends the launch with an error: called from a fiber it does not return to it; launch() throws.
[[noreturn]] void fail(const char* kind, const std::string& message);
std::string describe(const Thread& thread);
std::string describe(const Site& site);
std::string report_waiting();                 // who waits for what, one line per place

// Uniform in [0, bound). The same seed gives the same run.
uint32_t random_below(uint32_t bound);

// Runs `kernel()` on every thread of the grid and returns the totals.
// Raises: Error. Not reentrant; one launch at a time in the process.
Stats run_grid(const Config& config, void (*kernel)(void*), void* arguments);

template <typename Kernel, typename... Arguments>
Stats launch(const Config& config, Kernel kernel, const Arguments&... arguments) {
  auto body = [&] { kernel(arguments...); };
  return run_grid(config, [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body);
}

// ---- what wrappers use to wait ----

// Leaves the running thread, which is not ready, for the next ready lane of its warp (cyclically), or for the scheduler.
inline __attribute__((always_inline)) void leave(Thread& from) {
  Warp& warp = *from.warp;
  ++machine.stats.switches;
  Fiber* next = &machine.scheduler;
  if (warp.ready != 0) {
    const uint32_t above = warp.ready & (~1u << from.lane);  // ~1 << 31 is 0
    Thread& to = warp.threads[__builtin_ctz(above != 0 ? above : warp.ready)];
    machine.running = &to;
    next = &to.fiber;
  }
  switch_fiber(from.fiber, *next);
}

void block(const char* waits_for, int on);    // this thread stops until wake()
void wake(Thread& thread);
void preempt();                               // let the scheduler choose; this thread stays ready
void poll(const char* what, int on);          // one unsuccessful look at something that another thread must change
inline void progress() { machine.polls_since_progress = 0; }
// Every wrapper calls this first: a place where another warp may be run instead.
inline void enter(Site site) {
  self().site = site;
  if (--machine.budget < 0) preempt();
}

// Gathers the lanes of `mask`; the last one runs `work(warp, mask, operands)` for all of them. operands[lane] is what
// that lane brought; it stays valid until `work` returns.
using WarpWork = void (*)(Warp&, uint32_t mask, void* const* operands);
Gathering& open_gathering(const char* name, uint32_t mask, Site site);
inline __attribute__((always_inline)) void warp_collective(const char* name, uint32_t mask, void* operand, WarpWork work,
    Site site) {
  enter(site);
  Thread& t = self();
  Warp& warp = *t.warp;
  const uint32_t bit = 1u << t.lane;
  mask &= warp.members;
  Gathering* g = &warp.gatherings[0];
  if (g->mask != mask || g->name != name || (mask & bit) == 0) g = &open_gathering(name, mask, site);
  g->arrived |= bit;
  warp.operands[t.lane] = operand;
  if (g->arrived != mask) {
    t.waits_for = name;
    t.waits_on = -1;
    warp.ready &= ~bit;
    leave(t);
    return;
  }
  g->mask = 0;
  ++machine.stats.warp_collectives;
  progress();
  work(warp, mask, warp.operands);
  warp.ready |= mask;
}

// What __syncwarp does when all have come: each thread then knows what the others did to shared memory.
void sync_warp(Warp& warp, uint32_t mask, void* const*);

// bar.sync (wait = true) and bar.arrive. threads = 0: all threads of the CTA that have not exited.
void barrier(int id, int threads, bool wait, Site site);
// A thread that exits counts as arrived in every later __syncthreads, and in one that is under way.
void exit_barriers(Cta& cta);

}  // namespace sarathi::sim
