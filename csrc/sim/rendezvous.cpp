// Where threads meet: warp-wide gatherings, barriers, and the report of who waits for whom.
#include <map>

#include "sim/machine.h"
#include "sim/races.h"

namespace sarathi::sim {

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

void exit_barriers(Cta& cta) {
  for (int id = 0; id < kNamedBarriers; ++id) {
    Barrier& b = cta.barriers[id];
    if (b.arrived > 0 && b.whole_cta && b.arrived == cta.live_threads) complete(cta, b, id, nullptr);
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
        what += " (" + std::to_string(b.arrived) + " of " + std::to_string(b.whole_cta ? cta->live_threads : b.expected) +
            " arrived)";
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

}  // namespace sarathi::sim
