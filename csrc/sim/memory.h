// Shared and global memory: what may be touched, by whom it is checked, and the signal handler that names a wild access.
#pragma once
#include <sys/time.h>

#include <csignal>
#include <string>
#include <vector>

#include "sim/machine.h"

namespace sarathi::sim {

// Pages with an inaccessible page on both sides; the requested bytes end where the upper one begins, up to `alignment`.
class GuardedPages {
 public:
  GuardedPages(size_t bytes, size_t alignment);
  ~GuardedPages();
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;
  char* data() const { return data_; }
  size_t size() const { return bytes_; }
  char* first() const { return mapping_ + 4096; }                    // the accessible range around data
  char* last() const { return mapping_ + mapping_bytes_ - 4096; }
  bool is_guard(const void* address) const;
  void fill_slack(unsigned char value);                              // the accessible bytes that are not data
  // The first slack byte that is no longer `value`, as an offset from data; `found` says whether there is one.
  ptrdiff_t find_changed_slack(unsigned char value, bool& found) const;

 private:
  char* mapping_;
  size_t mapping_bytes_;
  char* data_;
  size_t bytes_;
};

// The dynamic shared memory of every CTA slot. Poisoned with 0xff (a NaN in every float format) for every CTA.
class SharedArena {
 public:
  char* take(int slot, size_t bytes);
  void check_canaries(const Cta& cta);                                // Raises: Error, when bytes around it were written
  const GuardedPages* find_guard(const void* address, int& slot) const;

 private:
  std::vector<std::unique_ptr<GuardedPages>> pages_;
};
SharedArena& shared_arena();

// The buffers that a kernel may touch through wrappers. Registered by the test; sorted by address.
class GlobalMemory {
 public:
  struct Buffer { char* begin; size_t bytes; std::string name; bool writable; const GuardedPages* guard; };
  void add(void* begin, size_t bytes, std::string name, bool writable, const GuardedPages* guard = nullptr);
  void remove(void* begin);
  void clear() { buffers_.clear(); }
  const Buffer* find(const void* address) const;                     // the last buffer that begins at or before it
  const Buffer* find_guard(const void* address) const;
  // Raises: Error out_of_bounds when [address, address + bytes) is not inside one registered (writable) buffer.
  void check(const void* address, size_t bytes, bool write, const char* what) const;

 private:
  std::vector<Buffer> buffers_;
};
GlobalMemory& global_memory();

// A registered global buffer of `count` elements whose neighbours cannot be touched, not even by plain loads.
template <typename T>
class GuardedBuffer {
 public:
  GuardedBuffer(std::string name, size_t count, bool writable = true)
      : pages_(count * sizeof(T), alignof(T) > 16 ? alignof(T) : 16), count_(count) {
    pages_.fill_slack(0xff);  // NaN for what reads before its begin
    global_memory().add(pages_.data(), count * sizeof(T), std::move(name), writable, &pages_);
  }
  ~GuardedBuffer() { global_memory().remove(pages_.data()); }
  T* data() const { return reinterpret_cast<T*>(pages_.data()); }
  T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return count_; }

 private:
  GuardedPages pages_;
  size_t count_;
};

// While alive, a segmentation fault inside the simulated kernel becomes an Error that names thread and buffer, and so does a
// loop that calls no wrapper for Config::hang_seconds.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  struct sigaction old_segv_, old_bus_, old_timer_;
  struct itimerval old_interval_;
  stack_t old_stack_;
  std::unique_ptr<char[]> stack_;
};

// st.global and ld.global through the wrappers, and what a gpu-scope fence or release does to the stores before it.
void store_global(void* address, const void* value, size_t bytes);
void load_global(const void* address, void* value, size_t bytes);
void fence_global();
// A strong operation on [address, address + bytes) comes after the calling thread's own plain stores to it.
void publish_global(void* address, size_t bytes);

// ---- addresses in the shared window ----

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<uint64_t>(static_cast<const char*>(pointer) - self().cta->smem);
  if (offset > machine.config.smem_bytes)
    fail("out_of_bounds", "a pointer that is not into this CTA's dynamic shared memory (" +
                              std::to_string(machine.config.smem_bytes) + " bytes) is used as one");
  return kSharedBase + static_cast<uint32_t>(offset);
}

// The host address of [address, address + bytes) in the shared window. Raises: out_of_bounds, misaligned.
inline char* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || static_cast<uint64_t>(offset) + bytes > machine.config.smem_bytes)
    fail("out_of_bounds", std::string(what) + ": bytes [" + std::to_string(static_cast<int64_t>(address) - kSharedBase) + ", " +
                              std::to_string(static_cast<int64_t>(address) - kSharedBase + bytes) + ") of " +
                              std::to_string(machine.config.smem_bytes) + " bytes of shared memory");
  if (offset % alignment != 0)
    fail("misaligned", std::string(what) + ": shared offset " + std::to_string(offset) + " is not a multiple of " +
        std::to_string(alignment));
  return self().cta->smem + offset;
}

inline bool is_shared(const void* pointer) {
  return static_cast<uint64_t>(static_cast<const char*>(pointer) - self().cta->smem) < machine.config.smem_bytes;
}

// A generic address that a wrapper is about to touch: shared memory of this CTA, or a registered global buffer.
inline void check_generic(const void* pointer, size_t bytes, bool write, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("misaligned", std::string(what) + ": address is not a multiple of " + std::to_string(bytes));
  if (is_shared(pointer))
    shared_pointer(shared_address(pointer), static_cast<uint32_t>(bytes), 1, what);
  else if (machine.config.check_global)
    global_memory().check(pointer, bytes, write, what);
}

}  // namespace sarathi::sim
