// The launches of the sm_80 attention kernel: one line per head_dim and dtype.
#include "cuda/attention_sm80.cuh"

#include "cuda/api.h"

namespace sarathi::sm80 {
namespace {

using Kernel = void (*)(AttentionParams);
struct Instantiation { Kernel kernel; int shared_bytes; };

template <typename Element, int kHeadDim>
constexpr Instantiation instantiate() { return {attention_kernel<Element, kHeadDim>, shared_bytes<Element, kHeadDim>()}; }

// A null kernel where there is none.
Instantiation instantiation_for(const AttentionParams& p) {
  if (p.dtype == DType::kBFloat16) switch (p.head_dim) {
    case 64: return instantiate<bfloat16, 64>();
    case 128: return instantiate<bfloat16, 128>();
    case 256: return instantiate<bfloat16, 256>();
  }
  if (p.dtype == DType::kFloat16) switch (p.head_dim) {
    case 64: return instantiate<float16, 64>();
    case 128: return instantiate<float16, 128>();
    case 256: return instantiate<float16, 256>();
  }
  return {nullptr, 0};
}

}  // namespace
}  // namespace sarathi::sm80

int sarathi_cuda_prepare_attention_sm80(const sarathi::AttentionParams* p) {
  const auto [kernel, shared_bytes] = sarathi::sm80::instantiation_for(*p);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  // Two CTAs need most of an SM's shared memory; what the driver would set aside for L1 by itself is not said anywhere.
  return error != cudaSuccess ? error : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                             cudaSharedmemCarveoutMaxShared);
}

int sarathi_cuda_attention_sm80(const sarathi::AttentionParams* p, int num_blocks, void* stream) {
  const auto [kernel, shared_bytes] = sarathi::sm80::instantiation_for(*p);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  kernel<<<num_blocks, sarathi::sm80::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(*p);
  return cudaGetLastError();
}
