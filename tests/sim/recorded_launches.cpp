// The C ABI of csrc/cuda/api.h, taking notes instead of launching: with csrc/cuda/bindings.cpp it makes the module
// _cuda_recorded, by which tests see what the real binding would launch, and how long it takes to.
#include "cuda/api.h"

namespace {
struct Recorded { sarathi::AttentionParams params; int num_blocks; void* stream; int device; };
Recorded last{};
int current_device = 0;
}  // namespace

int sarathi_cuda_runtime_version(int* version) { return *version = 0; }
int sarathi_cuda_driver_version(int* version) { return *version = 0; }
int sarathi_cuda_device_count(int* count) { return *count = 0; }
int sarathi_cuda_device_info(int, sarathi::DeviceInfo* info) {
  *info = {80, 2, 164 << 10};
  return 0;
}
const char* sarathi_cuda_error(int) { return "recorded"; }
int sarathi_cuda_use_device(int device, int* previous) {
  *previous = current_device;
  current_device = device;
  return 0;
}
int sarathi_cuda_prepare_attention_sm80(const sarathi::AttentionParams*) { return 0; }
int sarathi_cuda_attention_sm80(const sarathi::AttentionParams* p, int num_blocks, void* stream) {
  last = {*p, num_blocks, stream, current_device};
  return 0;
}
int sarathi_cuda_append_kv(const sarathi::AppendKvParams*, void*) { return 0; }
int sarathi_cuda_merge_states(const sarathi::MergeParams*, void*) { return 0; }
int sarathi_cuda_plan(const sarathi::PlanParams*, void*) { return 0; }

// The latest attention; what the functions return and where they point stays valid.
SARATHI_API const Recorded* sarathi_recorded_attention() { return &last; }
