#include "sim/races.h"

#include <algorithm>

namespace sarathi::sim {

// ---- knowledge ----

void Gathered::add(const Knowledge& knowledge) {
  if (knowledge == last_) return;
  last_ = knowledge;
  if (counts_.empty()) {
    counts_ = *knowledge;
    return;
  }
  const uint32_t* from = knowledge->data();
  for (size_t i = 0; i < counts_.size(); ++i) counts_[i] = std::max(counts_[i], from[i]);
}

void Gathered::add(int agent, uint32_t count) { counts_[agent] = std::max(counts_[agent], count); }

Knowledge Gathered::take(int num_agents) {
  counts_.resize(num_agents);
  auto knowledge = std::make_shared<const std::vector<uint32_t>>(std::move(counts_));
  counts_.clear();
  last_ = nullptr;
  return knowledge;
}

RaceChecker::RaceChecker(Cta& cta, size_t smem_bytes)
    : cta_(cta),
      num_threads_(static_cast<int>(cta.threads.size())),
      num_warps_(static_cast<int>(cta.warps.size())),
      granules_((smem_bytes + kGranule - 1) / kGranule),
      reads_(granules_.size() * num_warps_),
      proxies_(machine.config.arch >= 90) {
  const auto nothing = std::make_shared<const std::vector<uint32_t>>(num_agents());
  for (Thread& t : cta.threads) t.knowledge = nothing;
}

void RaceChecker::release(Thread& t, Gathered& to) {
  to.add(t.knowledge);
  to.add(t.index, t.count);
  ++t.count;
}

void RaceChecker::acquire(Thread& t, const Knowledge& knowledge) {
  // A barrier that the thread took part in knows all that the thread knew; an mbarrier that it only waits on may not.
  const auto& mine = *t.knowledge;
  const auto& theirs = *knowledge;
  bool covered = true;
  for (size_t i = 0; i < mine.size(); ++i) covered &= mine[i] <= theirs[i];
  if (covered) {
    t.knowledge = knowledge;
    return;
  }
  Gathered both;
  both.add(t.knowledge);
  both.add(knowledge);
  t.knowledge = both.take(num_agents());
}

// ---- accesses ----

template <typename Visit>
void RaceChecker::each_granule(uint32_t offset, uint32_t bytes, Visit visit) {
  const uint32_t end = offset + bytes;
  for (uint32_t g = offset / kGranule; g * kGranule < end; ++g) {
    const uint32_t first = g * kGranule >= offset ? 0 : (offset - g * kGranule) / kWord;
    const uint32_t last = std::min(3u, (end - 1 - g * kGranule) / kWord);
    visit(g, (2u << last) - (1u << first));
  }
}

void RaceChecker::check_writers(Thread& t, uint32_t granule, uint32_t words, const char* doing) {
  const Granule& g = granules_[granule];
  if (g.in_flight & words)
    report(granule, std::string(doing) + " bytes to which a copy is still under way, started by " + name(g.mover) + " at " +
        describe(g.async_site));
  const int checked = g.one_writer ? 1 : 4;
  for (int w = 0; w < checked; ++w) {
    if (checked == 4 && !(words >> w & 1)) continue;
    const int writer = g.writer[w];
    if (writer != kNobody && writer != t.index && g.count[w] > (*t.knowledge)[writer])
      report(granule, std::string(doing) + " bytes that " + name(writer) + " wrote at " + describe(g.write_site) +
          ", and nothing orders the two");
  }
}

void RaceChecker::check_readers(Thread& t, uint32_t granule, uint32_t words, const char* doing) {
  Granule& g = granules_[granule];
  if (g.async_readers > 0)
    report(granule, std::string(doing) + " bytes that are still being read asynchronously for " + name(g.mover) + " since " +
        describe(g.async_site));
  if (!g.was_read) return;
  for (int warp = 0; warp < num_warps_; ++warp) {
    const Read& r = reads_[granule * num_warps_ + warp];
    const int checked = r.one_reader ? 1 : 4;
    for (int w = 0; w < checked; ++w) {
      if (checked == 4 && !(words >> w & 1)) continue;
      const int reader = r.thread[w];
      if (reader != kNobody && reader != t.index && r.count[w] > (*t.knowledge)[reader])
        report(granule, std::string(doing) + " bytes that " + name(reader) + " read at " + describe(r.site) +
            ", and nothing orders the two");
    }
  }
}

// One reader per warp and word, the latest: it stands for lanes that read the same word before it.
void RaceChecker::record_read(Thread& t, uint32_t granule, uint32_t words) {
  granules_[granule].was_read = true;
  Read& r = reads_[granule * num_warps_ + t.warp->index];
  r.one_reader = words == 0xf;
  for (int w = 0; w < 4; ++w)
    if (words >> w & 1) {
      r.thread[w] = static_cast<uint16_t>(t.index);
      r.count[w] = t.count;
    }
  r.site = t.site;
}

void RaceChecker::record_write(int agent, uint32_t count, uint32_t granule, uint32_t words, Site site, bool generic_proxy) {
  Granule& g = granules_[granule];
  // Whoever is ordered after this write is ordered after the reads before it: they have been checked.
  g.was_read = g.was_read && words != 0xf;
  g.one_writer = words == 0xf;
  for (int w = 0; w < 4; ++w)
    if (words >> w & 1) {
      g.writer[w] = static_cast<uint16_t>(agent);
      g.count[w] = count;
    }
  g.write_site = site;
  if (!proxies_) return;
  if (!generic_proxy) {
    g.unfenced &= ~words;
  } else {
    if (g.unfenced == 0) unfenced_.push_back(granule);
    g.unfenced |= words;
  }
}

void RaceChecker::fence_proxy(Thread& t, const std::vector<uint32_t>* only) {
  size_t kept = 0;
  for (const uint32_t granule : unfenced_) {
    Granule& g = granules_[granule];
    const bool meant = only == nullptr || std::any_of(only->begin(), only->end(),
        [&](uint32_t offset) { return offset / kGranule == granule; });
    for (int w = 0; meant && w < 4; ++w) {
      const int writer = g.writer[w];
      if ((g.unfenced >> w & 1) && (writer == t.index || g.count[w] <= (*t.knowledge)[writer])) g.unfenced &= ~(1u << w);
    }
    if (g.unfenced != 0) unfenced_[kept++] = granule;
  }
  unfenced_.resize(kept);
}

void RaceChecker::check_fenced(Thread&, uint32_t offset, uint32_t bytes, const char* doing) {
  each_granule(offset, bytes, [&](uint32_t granule, uint32_t words) {
    const Granule& g = granules_[granule];
    for (int w = 0; w < 4; ++w)
      if (g.unfenced & words & 1u << w)
        report(granule, std::string(doing) + " that " + name(g.writer[w]) + " wrote at " + describe(g.write_site) +
            ", without a fence.proxy.async in between");
  });
}

void RaceChecker::read(Thread& t, uint32_t offset, uint32_t bytes) {
  each_granule(offset, bytes, [&](uint32_t g, uint32_t words) {
    check_writers(t, g, words, "reads");
    record_read(t, g, words);
  });
}

void RaceChecker::write(Thread& t, uint32_t offset, uint32_t bytes) {
  each_granule(offset, bytes, [&](uint32_t g, uint32_t words) {
    check_writers(t, g, words, "writes");
    check_readers(t, g, words, "writes");
    record_write(t.index, t.count, g, words, t.site, true);
  });
}

void RaceChecker::begin_copy(Thread& t, uint32_t offset, uint32_t bytes) {
  each_granule(offset, bytes, [&](uint32_t g, uint32_t words) {
    check_writers(t, g, words, "starts a copy onto");
    check_readers(t, g, words, "starts a copy onto");
    granules_[g].in_flight |= words;
    granules_[g].mover = static_cast<uint16_t>(t.index);
    granules_[g].async_site = t.site;
  });
}

void RaceChecker::finish_copy(int agent, uint32_t count, uint32_t offset, uint32_t bytes, bool generic_proxy) {
  each_granule(offset, bytes, [&](uint32_t g, uint32_t words) {
    granules_[g].in_flight &= ~words;
    record_write(agent, count, g, words, granules_[g].async_site, generic_proxy);
  });
}

void RaceChecker::begin_async_read(Thread& t, uint32_t offset, uint32_t bytes) {
  each_granule(offset, bytes, [&](uint32_t g, uint32_t words) {
    check_writers(t, g, words, "starts an asynchronous read of");
    check_fenced(t, g * kGranule, kGranule, "reads asynchronously bytes");
    ++granules_[g].async_readers;
    granules_[g].mover = static_cast<uint16_t>(t.index);
    granules_[g].async_site = t.site;
  });
}

void RaceChecker::finish_async_read(Thread& t, uint32_t offset, uint32_t bytes) {
  each_granule(offset, bytes, [&](uint32_t g, uint32_t words) {
    --granules_[g].async_readers;
    record_read(t, g, words);
  });
}

// ---- reports ----

std::string RaceChecker::name(int agent) const {
  if (agent >= num_threads_) return "a bulk copy (agent " + std::to_string(agent - num_threads_) + ")";
  return "thread " + std::to_string(agent) + " (warp " + std::to_string(agent / kWarpSize) + " lane " +
      std::to_string(agent % kWarpSize) + ")";
}

void RaceChecker::report(uint32_t granule, const std::string& message) const {
  fail("race", "at shared byte " + std::to_string(granule * kGranule) + " of block " + std::to_string(cta_.linear_index) +
      ": the thread " + message);
}

}  // namespace sarathi::sim
