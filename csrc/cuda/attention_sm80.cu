// The launches of the sm_80 attention kernel: one line per head_dim and dtype.
#include "cuda/attention_sm80.cuh"

#include "cuda/api.h"

namespace sarathi::sm80 {
namespace {

template <typename Element, int kHeadDim>
int launch(const AttentionParams& p, int num_blocks, cudaStream_t stream) {
  constexpr int bytes = shared_bytes<Element, kHeadDim>();
  // Per device and cheap; a static flag would have to know which devices it was set on.
  const cudaError_t error = cudaFuncSetAttribute(attention_kernel<Element, kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  attention_kernel<Element, kHeadDim><<<num_blocks, kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sarathi::sm80

int sarathi_cuda_attention_sm80(const sarathi::AttentionParams* p, int num_blocks, void* stream) {
  using namespace sarathi;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p->dtype == DType::kBFloat16) switch (p->head_dim) {
    case 64: return sm80::launch<bfloat16, 64>(*p, num_blocks, s);
    case 128: return sm80::launch<bfloat16, 128>(*p, num_blocks, s);
    case 256: return sm80::launch<bfloat16, 256>(*p, num_blocks, s);
  }
  if (p->dtype == DType::kFloat16) switch (p->head_dim) {
    case 64: return sm80::launch<float16, 64>(*p, num_blocks, s);
    case 128: return sm80::launch<float16, 128>(*p, num_blocks, s);
    case 256: return sm80::launch<float16, 256>(*p, num_blocks, s);
  }
  return cudaErrorInvalidValue;
}
