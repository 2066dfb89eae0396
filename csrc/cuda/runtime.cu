// What the library knows of the machine: versions, devices, error texts.
#include <cuda_runtime.h>

#include "cuda/api.h"

int sarathi_cuda_runtime_version(int* version) { return cudaRuntimeGetVersion(version); }

int sarathi_cuda_driver_version(int* version) { return cudaDriverGetVersion(version); }

int sarathi_cuda_device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  cudaGetLastError();  // it is reported here; a later launch must not see it again
  return error;
}

int sarathi_cuda_device_info(int device, sarathi::DeviceInfo* info) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&info->num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&info->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  info->compute_capability = 10 * major + minor;
  cudaGetLastError();
  return error;
}

int sarathi_cuda_use_device(int device, int* previous) {
  const cudaError_t error = cudaGetDevice(previous);
  return error != cudaSuccess || device == *previous ? error : cudaSetDevice(device);
}

const char* sarathi_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
