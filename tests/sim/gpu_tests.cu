// The instruction kernels on a GPU, behind one C function: arrays in, array out. Built and called by test_sim_instructions.py.
#include "gpu_arrays.h"

using namespace sarathi::testing;

// Returns a cudaError_t, or -1 for a kernel that is not in the table.
extern "C" int sarathi_gpu_test(const char* name, const void* const* inputs, const size_t* input_bytes, int num_inputs, void* out,
                                size_t out_bytes, const int* n, int grid, int block, size_t smem_bytes) {
  void (*kernel)(Args) = nullptr;
#define ENTRY(candidate) \
  if (std::strcmp(name, #candidate) == 0) kernel = candidate;
  SARATHI_TEST_KERNELS(ENTRY)
#undef ENTRY
  if (kernel == nullptr) return -1;
  DeviceArrays arrays(inputs, input_bytes, num_inputs, out, out_bytes, n);
  DeviceArrays::launch(kernel, grid, block, smem_bytes, arrays.args);
  return arrays.finish();
}
