// The launches of append_kv: wide where rows allow it, element by element otherwise.
#include "cuda/append_kv.cuh"

#include <algorithm>

#include "cuda/api.h"

namespace sarathi::append {
namespace {

template <typename Element, int kWidth>
int launch(const AppendKvParams& p, cudaStream_t stream) {
  const int64_t total = static_cast<int64_t>(p.total_q) * layout_of(p, kWidth).per_token();
  const int64_t blocks = std::min<int64_t>((total + kThreads - 1) / kThreads, 1 << 16);
  if (blocks > 0) append_kv_kernel<Element, kWidth><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sarathi::append

int sarathi_cuda_append_kv(const sarathi::AppendKvParams* p, void* stream) {
  using namespace sarathi;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p->dtype == DType::kBFloat16) return append::wide(*p) ? append::launch<bfloat16, 8>(*p, s) : append::launch<bfloat16, 1>(*p, s);
  if (p->dtype == DType::kFloat16) return append::wide(*p) ? append::launch<float16, 8>(*p, s) : append::launch<float16, 1>(*p, s);
  return cudaErrorInvalidValue;
}
