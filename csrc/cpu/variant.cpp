#include "variant.h"

#define SARATHI_TEXT(x) #x
#define SARATHI_NAME(x) SARATHI_TEXT(x)

namespace sarathi::SARATHI_ISA {

extern const Kernels kernels;
const Kernels kernels{SARATHI_NAME(SARATHI_ISA), streams, scratch_bytes, visit, merge, append_kv, merge_states};

}  // namespace sarathi::SARATHI_ISA
