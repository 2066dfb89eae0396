// Bank conflicts and sectors of accesses that each thread makes for itself. A warp executes them together on the GPU; here
// each lane comes by in its own time. The n-th visit of every lane to one source line is taken as one request: exact where
// a line is reached by all lanes or by none, an estimate where lanes skip it unevenly.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <tuple>

#include "sim/machine.h"

namespace sarathi::sim {

enum class Access : uint8_t { kSharedLoad, kSharedStore, kCopyDestination, kGlobalLoad, kGlobalStore, kCopySource };

// Totals of one source line. Shared: requests of 4-byte accesses can be one wavefront, of 8 bytes two, of 16 four. Global:
// sectors of 32 bytes.
struct AccessTotals { uint64_t requests = 0, bytes = 0, wavefronts = 0, conflicts = 0, sectors = 0; };

class WarpProfile {
 public:
  void record(const Thread& t, Access kind, uintptr_t address, uint32_t bytes, Site site);
  void finish();                              // requests that some lanes never joined

 private:
  struct Request { uintptr_t address[kWarpSize]; uint32_t bytes = 0, lanes = 0; };
  struct Line { uint64_t visits[kWarpSize] = {}, first = 0; std::deque<Request> requests; };
  using Key = std::tuple<const char*, int, Access>;
  static void count(const Key& key, const Request& request);
  std::map<Key, Line> lines_;
};

inline void profile_access(Access kind, uintptr_t address, uint32_t bytes) {
  Thread& t = self();
  if (t.warp->profile) t.warp->profile->record(t, kind, address, bytes, t.site);
}

// Of the latest launch, by "file:line kind".
std::map<std::string, AccessTotals> profile_totals();
void clear_profile();

}  // namespace sarathi::sim
