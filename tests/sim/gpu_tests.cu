// The instruction kernels on a GPU, behind one C function: arrays in, array out. Built and called by test_sim_instructions.py.
#include <cstring>
#include <vector>

#include "kernels.cuh"

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
  Args args{};
  std::memcpy(args.n, n, sizeof args.n);
  std::vector<void*> held;
  const auto copy_in = [&](const void* from, size_t bytes) {
    void* device = nullptr;
    cudaMalloc(&device, bytes);
    cudaMemcpy(device, from, bytes, cudaMemcpyHostToDevice);
    held.push_back(device);
    return device;
  };
  for (int i = 0; i < num_inputs; ++i) args.in[i] = copy_in(inputs[i], input_bytes[i]);
  args.out = copy_in(out, out_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  kernel<<<grid, block, smem_bytes>>>(args);
  const cudaError_t error = cudaDeviceSynchronize();
  cudaMemcpy(out, args.out, out_bytes, cudaMemcpyDeviceToHost);
  for (void* device : held) cudaFree(device);
  return error != cudaSuccess ? error : cudaGetLastError();
}
