// A fiber is a stack and a place to continue: the simulator runs one per CUDA thread. On x86-64 a switch saves six
// registers (a few nanoseconds); elsewhere it is ucontext, which also saves the signal mask and costs a system call.
#pragma once
#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sarathi::sim {

class Fiber {
 public:
  // Prepares the fiber to run `entry` on [stack, stack + bytes) when it is first switched to. `entry` never returns.
  void prepare(void* stack, size_t bytes, void (*entry)());
  friend void switch_fiber(Fiber& from, Fiber& to);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

void switch_fiber(Fiber& from, Fiber& to);

// Stacks with an inaccessible page below each, kept for the next launch.
class StackPool {
 public:
  static constexpr size_t kBytes = 256 << 10;  // virtual; only touched pages cost memory
  ~StackPool();
  char* take();
  void give(char* stack) { free_.push_back(stack); }
  // The stack whose guard page holds `address`, or null.
  bool is_guard(const void* address) const;

 private:
  static constexpr int kStacksPerBlock = 128;
  std::vector<char*> blocks_, free_;
};

}  // namespace sarathi::sim
