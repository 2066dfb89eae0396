// Host arrays on a GPU for the length of one test kernel: what gpu_tests.cu and gpu_tests_sm90.cu share.
#pragma once
#include <cstring>
#include <vector>

#include "kernels.cuh"

namespace sarathi::testing {

// The kernel's arguments on the device; the output is copied back by `finish`.
class DeviceArrays {
 public:
  Args args{};

  DeviceArrays(const void* const* inputs, const size_t* input_bytes, int num_inputs, void* out, size_t out_bytes, const int* n)
      : out_(out), out_bytes_(out_bytes) {
    std::memcpy(args.n, n, sizeof args.n);
    for (int i = 0; i < num_inputs; ++i) args.in[i] = copy_in(inputs[i], input_bytes[i]);
    args.out = copy_in(out, out_bytes);
  }
  ~DeviceArrays() {
    for (void* device : held_) cudaFree(device);
  }
  DeviceArrays(const DeviceArrays&) = delete;
  DeviceArrays& operator=(const DeviceArrays&) = delete;

  template <typename Kernel, typename... Arguments>
  static void launch(Kernel kernel, int grid, int block, size_t smem_bytes, const Arguments&... arguments) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    kernel<<<grid, block, smem_bytes>>>(arguments...);
  }
  // Waits for the kernel. Returns the first error of all that was done here.
  int finish() {
    const cudaError_t error = cudaDeviceSynchronize();
    cudaMemcpy(out_, args.out, out_bytes_, cudaMemcpyDeviceToHost);
    return error != cudaSuccess ? error : cudaGetLastError();
  }

 private:
  void* copy_in(const void* from, size_t bytes) {
    void* device = nullptr;
    cudaMalloc(&device, bytes);
    cudaMemcpy(device, from, bytes, cudaMemcpyHostToDevice);
    held_.push_back(device);
    return device;
  }

  void* out_;
  size_t out_bytes_;
  std::vector<void*> held_;
};

}  // namespace sarathi::testing
