// Happens-before over shared memory: who wrote and who read each word last, and what each thread knows of the others.
//
// Every thread counts the synchronisations it takes part in; a barrier passes on what its members know. An access that is
// not ordered after the access it conflicts with is a race, whatever the scheduler did this time: a missing barrier or a
// wait_group that waits for too little is found in every run. Plain loads and stores of the kernel cannot be seen; what
// comes through the wrappers (cp.async, ldmatrix, ld_shared, st_shared, TMA, wgmma) can.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sim/machine.h"

namespace sarathi::sim {

// What a thread knows of everybody: the count up to which it has seen each agent. Shared by all who left one barrier.
using Knowledge = std::shared_ptr<const std::vector<uint32_t>>;

// Knowledge gathered from several threads, to be given to those that leave a barrier.
class Gathered {
 public:
  void add(const Knowledge& knowledge);        // cheap when it is what was added last
  void add(int agent, uint32_t count);
  Knowledge take(int num_agents);              // and starts afresh
  bool empty() const { return counts_.empty(); }

 private:
  std::vector<uint32_t> counts_;
  Knowledge last_;
};

// One per CTA. Offsets are bytes of dynamic shared memory. Threads are agents 0 .. num_threads - 1; the agents after them
// are asynchronous units (the bulk copies that complete on one mbarrier are one agent).
class RaceChecker {
 public:
  static constexpr int kAsyncAgents = 64;
  RaceChecker(Cta& cta, size_t smem_bytes);

  int num_agents() const { return num_threads_ + kAsyncAgents; }
  int num_threads() const { return num_threads_; }

  void read(Thread& t, uint32_t offset, uint32_t bytes);
  void write(Thread& t, uint32_t offset, uint32_t bytes);
  // A copy into shared memory: nobody may touch the bytes until it is finished, which makes them a write of `agent`.
  void begin_copy(Thread& t, uint32_t offset, uint32_t bytes);
  void finish_copy(int agent, uint32_t count, uint32_t offset, uint32_t bytes, bool generic_proxy);
  // An asynchronous reader: nobody may write the bytes until it is finished, which makes them a read of `t`.
  void begin_async_read(Thread& t, uint32_t offset, uint32_t bytes);
  void finish_async_read(Thread& t, uint32_t offset, uint32_t bytes);

  // Shared memory has two proxies. What a thread wrote (or cp.async for it) reaches TMA and wgmma only after a
  // fence.proxy.async by the writer, or by somebody ordered after it.
  void fence_proxy(Thread& t, const std::vector<uint32_t>* only = nullptr);   // of these offsets, or of all
  void check_fenced(Thread& t, uint32_t offset, uint32_t bytes, const char* doing);

  // Releases what `t` knows and did into `to`; what it does from now on is not part of it.
  void release(Thread& t, Gathered& to);
  void acquire(Thread& t, const Knowledge& knowledge);

 private:
  static constexpr uint32_t kGranule = 16, kWord = 4;
  static constexpr uint16_t kNobody = 0xffff;
  struct Granule {
    uint32_t count[4] = {};                     // of the writer of each 4-byte word, when it wrote
    uint16_t writer[4] = {kNobody, kNobody, kNobody, kNobody};
    uint8_t in_flight = 0;                      // words that a copy is on its way to, one bit each
    uint8_t unfenced = 0;                       // words written through the generic proxy, one bit each
    uint16_t async_readers = 0;                 // unfinished asynchronous reads of any of its words
    bool one_writer = true;                     // all four words have the writer and count of word 0
    bool was_read = false;                      // since the last write
    uint16_t mover = kNobody;                   // thread that started the latest copy or asynchronous read
    Site write_site{nullptr, 0}, async_site{nullptr, 0};
  };
  struct Read {
    uint32_t count[4] = {};                     // of the reader of each 4-byte word, when it read
    uint16_t thread[4] = {kNobody, kNobody, kNobody, kNobody};
    bool one_reader = true;                     // all four words have the thread and count of word 0
    Site site{nullptr, 0};
  };

  template <typename Visit>
  void each_granule(uint32_t offset, uint32_t bytes, Visit visit);
  void check_writers(Thread& t, uint32_t granule, uint32_t words, const char* doing);
  void check_readers(Thread& t, uint32_t granule, uint32_t words, const char* doing);
  void record_read(Thread& t, uint32_t granule, uint32_t words);
  void record_write(int agent, uint32_t count, uint32_t granule, uint32_t words, Site site, bool generic_proxy);
  [[noreturn]] void report(uint32_t granule, const std::string& message) const;
  std::string name(int agent) const;

  Cta& cta_;
  int num_threads_, num_warps_;
  std::vector<Granule> granules_;
  std::vector<Read> reads_;                     // [granule][warp]: its latest read of each word
  bool proxies_;                                // sm_90
  std::vector<uint32_t> unfenced_;              // granules that may have unfenced words
};

}  // namespace sarathi::sim
