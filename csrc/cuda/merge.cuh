// Attention over disjoint sets of keys, combined: out = sum_s 2^(lse_s - lse) out_s. Bound by memory: a thread reads
// kWidth elements of every state of its row.
#pragma once
#include "element.cuh"
#include "softmax.cuh"

namespace sarathi::merge {

constexpr int kThreads = 256;

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeParams p) {
  using G = Group<Element, kWidth>;
  const int groups = p.head_dim / kWidth;
  const int64_t total = p.rows * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += stride) {
    const int64_t row = i / groups, element = i % groups * kWidth;
    SoftmaxState state{-INFINITY, 0.0f};
    for (int s = 0; s < p.num_states; ++s) state.max = fmaxf(state.max, p.lses[s * p.rows + row] * kLog2E);
    float sums[kWidth] = {};
    for (int s = 0; s < p.num_states; ++s) {
      const float weight = rebase(p.lses[s * p.rows + row] * kLog2E, state.max);
      if (weight == 0.0f) continue;  // a state that saw no key may hold anything
      const G group = *reinterpret_cast<const G*>(static_cast<const Element*>(p.outs) + (s * p.rows + row) * p.head_dim + element);
      state.sum += weight;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums[e] += weight * to_float(group.x[e]);
    }
    const float factor = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
    G merged;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) merged.x[e] = from_float<Element>(sums[e] * factor);
    *reinterpret_cast<G*>(static_cast<Element*>(p.out) + row * p.head_dim + element) = merged;
    if (element == 0) p.lse[row] = natural_lse(state);
  }
}

}  // namespace sarathi::merge
