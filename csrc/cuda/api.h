// The C ABI of libsarathi_cuda.so: the CUDA kernels and nothing of Python. cudart is linked statically and finds the driver
// when first called, so the library loads on a machine without one; every call then returns an error code.
//
// All functions return a cudaError_t as an int, 0 for success. The ops enqueue on `stream` (a cudaStream_t) of the current
// device and return; they allocate nothing and never wait, so that a graph can capture them. Pointers in the argument
// blocks are device pointers; the blocks themselves are read before the call returns.
#pragma once
#include <cstdint>

#include "params.h"

#define SARATHI_API extern "C" __attribute__((visibility("default")))

namespace sarathi {

struct DeviceInfo {
  int32_t compute_capability;   // 10 * major + minor
  int32_t num_sms;
  int32_t shared_bytes;         // per block, opted in
};

}  // namespace sarathi

SARATHI_API int sarathi_cuda_runtime_version(int* version);
SARATHI_API int sarathi_cuda_driver_version(int* version);   // 0 when there is no driver
SARATHI_API int sarathi_cuda_device_count(int* count);
SARATHI_API int sarathi_cuda_device_info(int device, sarathi::DeviceInfo* info);
SARATHI_API const char* sarathi_cuda_error(int code);
// Makes `device` the current one; *previous is the one that was.
SARATHI_API int sarathi_cuda_use_device(int device, int* previous);

// Before the first attention of this dtype and head_dim on the current device: lets its kernel use the shared memory it needs.
SARATHI_API int sarathi_cuda_prepare_attention_sm80(const sarathi::AttentionParams* p);
// num_blocks: persistent CTAs to launch, 2 per SM at most; p->counts says how much work there is.
SARATHI_API int sarathi_cuda_attention_sm80(const sarathi::AttentionParams* p, int num_blocks, void* stream);
// Rows (innermost head_dim) must begin at multiples of 16 bytes where head_dim is a multiple of 8; the same for merge_states.
SARATHI_API int sarathi_cuda_append_kv(const sarathi::AppendKvParams* p, void* stream);
SARATHI_API int sarathi_cuda_merge_states(const sarathi::MergeParams* p, void* stream);
SARATHI_API int sarathi_cuda_plan(const sarathi::PlanParams* p, void* stream);
