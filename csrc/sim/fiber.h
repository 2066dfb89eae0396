// A fiber is a stack and a place to continue: the simulator runs one per CUDA thread. On x86-64 a switch saves two registers
// and lets the compiler keep what else it needs (about ten nanoseconds); elsewhere, or with SARATHI_SIM_UCONTEXT, it is
// ucontext, which also saves the signal mask and costs a system call.
#pragma once
#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(SARATHI_SIM_UCONTEXT)
#define SARATHI_SIM_UCONTEXT
#include <ucontext.h>
#endif

namespace sarathi::sim {

class Fiber {
 public:
  // Prepares the fiber to run `entry` on [stack, stack + bytes) when it is first switched to. `entry` never returns.
  void prepare(void* stack, size_t bytes, void (*entry)());

#if !defined(SARATHI_SIM_UCONTEXT)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Inlined, and a jump rather than a return: a `ret` to where nothing was called from defeats the processor's return
// predictor in every frame below it, which costs several times the switch itself.
inline __attribute__((always_inline)) void switch_fiber(Fiber& from, Fiber& to) {
#if !defined(SARATHI_SIM_UCONTEXT)
  void** save = &from.stack_pointer;
  void* next = to.stack_pointer;
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"  // the red zone of the function this is inlined into
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%0)\n\t"
      "movq %1, %%rsp\n\t"
      "popq %%rax\n\t"
      "jmp *%%rax\n"
      "1:\tpopq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(save), "+S"(next)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4",
        "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory"
#if defined(__AVX512F__)
        , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
        "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#endif
  );
#else
  swapcontext(&from.context, &to.context);
#endif
}

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
