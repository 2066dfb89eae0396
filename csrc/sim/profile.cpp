#include "sim/profile.h"

#include <algorithm>
#include <set>

namespace sarathi::sim {
namespace {

std::map<std::string, AccessTotals> totals;

const char* name(Access kind) {
  switch (kind) {
    case Access::kSharedLoad: return "shared load";
    case Access::kSharedStore: return "shared store";
    case Access::kCopyDestination: return "copy to shared";
    case Access::kGlobalLoad: return "global load";
    case Access::kGlobalStore: return "global store";
    case Access::kCopySource: return "copy from global";
  }
  return "";
}

bool is_shared_access(Access kind) { return kind <= Access::kCopyDestination; }

}  // namespace

void WarpProfile::record(const Thread& t, Access kind, uintptr_t address, uint32_t bytes, Site site) {
  Line& line = lines_[{site.file, site.line, kind}];
  const uint64_t visit = line.visits[t.lane]++ - line.first;
  if (visit >= line.requests.size()) line.requests.resize(visit + 1);
  Request& request = line.requests[visit];
  request.address[t.lane] = address;
  request.bytes = bytes;
  request.lanes |= 1u << t.lane;
  while (!line.requests.empty() && line.requests.front().lanes == t.warp->members) {
    count({site.file, site.line, kind}, line.requests.front());
    line.requests.pop_front();
    ++line.first;
  }
}

void WarpProfile::finish() {
  for (const auto& [key, line] : lines_)
    for (const Request& request : line.requests)
      if (request.lanes != 0) count(key, request);
  lines_.clear();
}

void WarpProfile::count(const Key& key, const Request& request) {
  const auto& [file, line, kind] = key;
  AccessTotals& t = totals[describe(Site(file, line)) + " " + name(kind)];
  ++t.requests;
  t.bytes += static_cast<uint64_t>(__builtin_popcount(request.lanes)) * request.bytes;
  if (!is_shared_access(kind)) {
    std::set<uintptr_t> sectors;
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (request.lanes >> lane & 1)
        for (uintptr_t s = request.address[lane] / 32; s <= (request.address[lane] + request.bytes - 1) / 32; ++s)
          sectors.insert(s);
    t.sectors += sectors.size();
    return;
  }
  // 128 bytes pass at a time: 32 lanes of 4 bytes, 16 of 8, 8 of 16. Lanes that want one word share it.
  const int group = std::min<int>(kWarpSize, 128 / std::max(4u, request.bytes));
  for (int first = 0; first < kWarpSize; first += group) {
    std::set<uintptr_t> words[32];
    for (int lane = first; lane < first + group; ++lane)
      if (request.lanes >> lane & 1)
        for (uintptr_t w = request.address[lane] / 4; w <= (request.address[lane] + request.bytes - 1) / 4; ++w)
          words[w % 32].insert(w);
    size_t wavefronts = 0;
    for (const auto& bank : words) wavefronts = std::max(wavefronts, bank.size());
    t.wavefronts += wavefronts;
    t.conflicts += wavefronts > 1 ? wavefronts - 1 : 0;
  }
}

std::map<std::string, AccessTotals> profile_totals() { return totals; }
void clear_profile() { totals.clear(); }

}  // namespace sarathi::sim
