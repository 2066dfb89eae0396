#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(SARATHI_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sarathi {

namespace generic { extern const Kernels kernels; }
#if defined(SARATHI_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
namespace amx_emulated { extern const Kernels kernels; }

namespace {

// Tile registers are large, and Linux gives them to a process that asks. Asked once, before the pool has threads or for all of them.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace
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
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
    isas.push_back(&avx512bf16::kernels);
    if (has_amx()) isas.push_back(&amx::kernels);
  }
#endif
  return isas;
}

namespace {

const Kernels* find(const std::string& name, const char* asked_by) {
#if defined(SARATHI_X86)
  // For tests of the AMX kernels' source. Never chosen unless named, and not among those this CPU "can run".
  if (name == amx_emulated::kernels.name && __builtin_cpu_supports("avx512bf16")) return &amx_emulated::kernels;
#endif
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
