// The launches of merge_states.
#include "cuda/merge.cuh"

#include <algorithm>

#include "cuda/api.h"

namespace sarathi::merge {
namespace {

template <typename Element, int kWidth>
int launch(const MergeParams& p, cudaStream_t stream) {
  const int64_t total = p.rows * (p.head_dim / kWidth);
  const int64_t blocks = std::min<int64_t>((total + kThreads - 1) / kThreads, 1 << 16);
  if (blocks > 0) merge_kernel<Element, kWidth><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sarathi::merge

int sarathi_cuda_merge_states(const sarathi::MergeParams* p, void* stream) {
  using namespace sarathi;
  const auto s = static_cast<cudaStream_t>(stream);
  const bool wide = p->head_dim % 8 == 0;
  if (p->dtype == DType::kBFloat16) return wide ? merge::launch<bfloat16, 8>(*p, s) : merge::launch<bfloat16, 1>(*p, s);
  if (p->dtype == DType::kFloat16) return wide ? merge::launch<float16, 8>(*p, s) : merge::launch<float16, 1>(*p, s);
  return cudaErrorInvalidValue;
}
