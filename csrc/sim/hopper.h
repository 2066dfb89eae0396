// sm_90 units: mbarriers with transaction counts, bulk copies by tensor map (TMA), wgmma, register reallocation. Semantics
// from the PTX ISA manual, sections "mbarrier", "Data movement: bulk copy", "Tensors" and "wgmma".
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "sim/machine.h"
#include "sim/races.h"

// The host's name for it. The contents are the simulator's own (TensorMap), as those of the driver's are its own.
struct alignas(64) CUtensorMap { uint64_t opaque[16]; };

namespace sarathi::sim {

// Work that goes on by itself until the scheduler lets it land. Completion::kEager: at once.
struct AsyncOp {
  Cta* cta;
  const char* what;
  Site site;
  std::function<void()> run;
};
void start_async(AsyncOp op);
bool complete_async();                        // lands one; false when nothing is under way

struct Mbarrier {
  int count = 0, pending = 0;                 // arrivals per phase, and those still to come in this one
  int64_t tx = 0;                             // bytes expected minus bytes that came
  uint32_t phase = 0;                         // phases completed
  int agent = 0;                              // its bulk copies' place in what threads know (races.h)
  Gathered gathered;                          // of the phase under way
  Knowledge completed;                        // of the latest completed phase
  std::vector<Thread*> waiting;
};

enum class Swizzle : uint8_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };  // values of the wgmma descriptor

struct WgmmaOperand {                         // one warp's share of one wgmma: 16 rows of m64nNk16
  float* d[kWarpSize];
  uint32_t a[kWarpSize][4];                   // when `a_in_registers`
  uint64_t descriptor_a, descriptor_b;
  int n;
  bool a_in_registers, mn_major_a, mn_major_b, bfloat16, accumulate;
  bool done;
  Site site;
};

struct WgmmaQueue {                           // per warp
  std::vector<std::unique_ptr<WgmmaOperand>> open;
  std::deque<std::vector<std::unique_ptr<WgmmaOperand>>> groups;
  bool fenced = false;                        // wgmma.fence since registers may have been touched
  uint64_t issued = 0;
};

struct BulkStore { uint32_t offset, bytes; std::function<void()> run; bool done = false; };

// What a CTA has of all this.
struct Hopper {
  explicit Hopper(Cta& cta);
  std::map<uint32_t, Mbarrier> mbarriers;     // by shared offset
  std::vector<WgmmaQueue> wgmma;              // by warp
  std::vector<std::vector<uint64_t>> wgmma_log;  // by warpgroup: a digest of each wgmma, the same in all four warps
  std::map<int, std::vector<std::shared_ptr<BulkStore>>> open_stores;         // by thread
  std::map<int, std::deque<std::vector<std::shared_ptr<BulkStore>>>> store_groups;
  std::vector<int> registers;                 // by warp: per thread
  int free_registers = 0;                     // given back by setmaxnreg.dec, in units of one per thread of a warp
};
void check_retired(Cta& cta);                 // nothing may be under way when a CTA ends

// ---- mbarrier; `bar` is a shared address ----
void mbarrier_init(uint32_t bar, int count, Site site);
void mbarrier_arrive(uint32_t bar, int expect_bytes, Site site);
bool mbarrier_test(uint32_t bar, int parity, Site site);   // one look
void mbarrier_wait(uint32_t bar, int parity, Site site);
void cp_async_mbarrier_arrive(uint32_t bar, Site site);    // noinc: an arrival when this thread's cp.async have landed
void mbarrier_fence_init(Site site);
void fence_proxy_async(Site site);

// ---- bulk copies ----
struct TensorMap {
  uint64_t magic;
  char* base;
  uint64_t strides[4];                        // bytes, of dimensions 1 ..
  uint32_t dims[5], box[5];
  uint16_t rank, element_bytes;
  Swizzle swizzle;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "the map must fit the driver's size");

// What cuTensorMapEncodeTiled checks. strides: bytes, of dimensions 1 .. rank - 1. Raises: Error launch.
CUtensorMap encode_tensor_map(void* base, int element_bytes, const std::vector<uint64_t>& dims,
    const std::vector<uint64_t>& strides,
                              const std::vector<uint32_t>& box, Swizzle swizzle);
void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t bar, const std::vector<int>& at, Site site);
void tma_store(const CUtensorMap* map, uint32_t smem, const std::vector<int>& at, Site site);
void bulk_load(uint32_t smem, const void* from, uint32_t bytes, uint32_t bar, Site site);
void bulk_commit(Site site);
void bulk_wait(int pending_groups, Site site);

// For what lands on an mbarrier: the barrier at a shared address, and bytes that have come.
Mbarrier& mbarrier_for_copy(uint32_t bar);
void complete_tx(Cta& cta, Mbarrier& b, int64_t bytes);

// ---- wgmma, registers ----
void wgmma(const WgmmaOperand& mine, float* d, const uint32_t* a, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending_groups, Site site);
void set_registers(int registers, bool increase, Site site);
bool elect(Site site);

// Swizzle by the address itself: 16-byte chunks exchanged within 128 (64, 32) bytes by bits 7 and up.
inline uint32_t swizzled(uint32_t address, Swizzle mode) {
  switch (mode) {
    case Swizzle::k128: return address ^ ((address >> 7 & 7) << 4);
    case Swizzle::k64: return address ^ ((address >> 7 & 3) << 4);
    case Swizzle::k32: return address ^ ((address >> 7 & 1) << 4);
    case Swizzle::kNone: break;
  }
  return address;
}

}  // namespace sarathi::sim
