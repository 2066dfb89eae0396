#include "sim/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace sarathi::sim {
namespace {
constexpr size_t kGuard = 4096;
}

#if !defined(SARATHI_SIM_UCONTEXT)

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<void**>(top);
  *--slots = nullptr;  // the return address that `entry` would use; also gives it the alignment of a called function
  *--slots = reinterpret_cast<void*>(entry);
  stack_pointer = slots;
}

#else

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

StackPool::~StackPool() {
  for (char* block : blocks_) munmap(block, kStacksPerBlock * (kBytes + kGuard));
}

char* StackPool::take() {
  if (free_.empty()) {
    void* block = mmap(nullptr, kStacksPerBlock * (kBytes + kGuard), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) throw std::bad_alloc();
    blocks_.push_back(static_cast<char*>(block));
    for (int i = kStacksPerBlock - 1; i >= 0; --i) {
      char* guard = blocks_.back() + i * (kBytes + kGuard);
      mprotect(guard, kGuard, PROT_NONE);
      free_.push_back(guard + kGuard);
    }
  }
  char* stack = free_.back();
  free_.pop_back();
  return stack;
}

bool StackPool::is_guard(const void* address) const {
  for (const char* block : blocks_) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(address) - block);
    if (offset < kStacksPerBlock * (kBytes + kGuard)) return offset % (kBytes + kGuard) < kGuard;
  }
  return false;
}

}  // namespace sarathi::sim
