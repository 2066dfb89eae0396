#include "sim/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace sarathi::sim {
namespace {
constexpr size_t kGuard = 4096;
}

#if defined(__x86_64__)

// void sarathi_sim_switch(void** save_stack_pointer, void* next_stack_pointer): the registers that a callee must keep.
asm(R"(
.text
.hidden sarathi_sim_switch
.type sarathi_sim_switch, @function
sarathi_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sarathi_sim_switch, .-sarathi_sim_switch
)");
extern "C" __attribute__((visibility("hidden"))) void sarathi_sim_switch(void** save, void* next);

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<void**>(top);
  *--slots = nullptr;  // the return address that `entry` would use; also gives it the alignment of a called function
  *--slots = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slots = nullptr;
  stack_pointer_ = slots;
}

void switch_fiber(Fiber& from, Fiber& to) { sarathi_sim_switch(&from.stack_pointer_, to.stack_pointer_); }

#else

void Fiber::prepare(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

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
