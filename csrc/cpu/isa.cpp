#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sarathi {

namespace generic { extern const Kernels kernels; }
#if defined(SARATHI_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#endif

std::vector<const Kernels*> available_isas() {
  std::vector<const Kernels*> isas{&generic::kernels};
#if defined(SARATHI_X86)
  // These ask the operating system too (xgetbv): a CPU feature whose registers are not saved counts as absent.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx2) isas.push_back(&avx2::kernels);
  if (has_avx512) isas.push_back(&avx512::kernels);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back(&avx512bf16::kernels);
#endif
  return isas;
}

namespace {

const Kernels* find(const std::string& name, const char* asked_by) {
  std::string names;
  for (const Kernels* isa : available_isas()) {
    if (name == isa->name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument(std::string(asked_by) + " names the ISA '" + name + "', but this CPU can run: " + names);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_acquire);
  if (!k) {
    const char* name = std::getenv("SARATHI_CPU_ISA");
    k = name && *name ? find(name, "SARATHI_CPU_ISA") : available_isas().back();
    chosen.store(k, std::memory_order_release);
  }
  return *k;
}

void set_isa(const std::string& name) { chosen.store(find(name, "set_isa"), std::memory_order_release); }

}  // namespace sarathi
