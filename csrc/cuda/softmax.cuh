// Softmax in parts. Exponents are base 2: scores are multiplied by softmax_scale * log2(e) on the way in, and only an lse
// that leaves the kernel is turned back to natural log.
#pragma once
#include <cmath>

#include "ptx.cuh"
#include "work.cuh"

namespace sarathi {

// Maximum and sum of a part of a row's softmax. A part that saw no key has maximum -inf and sum 0.
struct SoftmaxState { float max, sum; };

// What a part's exponentials must be multiplied by to count from `max`.
__device__ __forceinline__ float rebase(float part_max, float max) {
  return part_max == -INFINITY ? 0.0f : ptx::exp2_approx(part_max - max);
}

// The natural-log lse of a complete row.
__device__ __forceinline__ float natural_lse(const SoftmaxState& s) {
  return s.sum > 0.0f ? (s.max + ptx::log2_approx(s.sum)) * kLn2 : -INFINITY;
}

// tanh through exp2: absolute error about 1e-7, where the hardware's tanh has 5e-4, too much times a softcap of 50.
__device__ __forceinline__ float tanh_ex2(float x) {
  return 1.0f - 2.0f * ptx::rcp_approx(ptx::exp2_approx(x * (2.0f * kLog2E)) + 1.0f);
}

// The running softmax of the 16 * kFrags rows of a warp's tile, in the registers of an mma accumulator: lane l holds, of
// fragment f, rows 16 f + l / 4 and + 8, and two columns of every eight. Sums are this lane's until `finish`.
template <int kFrags>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;
  float max[2 * kFrags], sum[2 * kFrags];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int r = 0; r < 2 * kFrags; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0.0f;
    }
  }

  // Takes in the scores of the next keys, which become exponentials counted from the row's reference maximum.
  // scale: multiplies the scores; positive.
  //
  // The reference need not be the maximum: exponentials up to 2^kSlack are as exact as those up to 1. So it stays while
  // the scores outgrow it by less, and after the first keys `out` is hardly ever rescaled. Each row decides for itself.
  template <int kKeyFrags, int kDimFrags>
  __device__ __forceinline__ void update(float (&scores)[kFrags][kKeyFrags][4], float (&out)[kFrags][kDimFrags][4], float scale) {
    float shrink[2 * kFrags];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2 * kFrags; ++r) {
      const int f = r / 2, h = r % 2 * 2;
      float highest = scores[f][0][h];
#pragma unroll
      for (int j = 0; j < kKeyFrags; ++j) highest = fmaxf(highest, fmaxf(scores[f][j][h], scores[f][j][h + 1]));
      highest = fmaxf(highest, ptx::shfl_xor(highest, 1));
      highest = fmaxf(highest, ptx::shfl_xor(highest, 2));
      highest *= scale;
      const float old = max[r];
      if (highest > old + kSlack) max[r] = highest;
      // A row that has seen nothing yet must not compute -inf - -inf.
      const float base = max[r] == -INFINITY ? 0.0f : max[r];
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeyFrags; ++j) {
        scores[f][j][h] = ptx::exp2_approx(scores[f][j][h] * scale - base);
        scores[f][j][h + 1] = ptx::exp2_approx(scores[f][j][h + 1] * scale - base);
        added += scores[f][j][h] + scores[f][j][h + 1];
      }
      shrink[r] = ptx::exp2_approx(old - base);
      moved |= max[r] != old;
      sum[r] = sum[r] * shrink[r] + added;
    }
    if (!ptx::any(moved)) return;
#pragma unroll
    for (int r = 0; r < 2 * kFrags; ++r)
#pragma unroll
      for (int d = 0; d < kDimFrags; ++d) {
        out[r / 2][d][r % 2 * 2] *= shrink[r];
        out[r / 2][d][r % 2 * 2 + 1] *= shrink[r];
      }
  }

  // Adds up the four lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2 * kFrags; ++r) {
      sum[r] += ptx::shfl_xor(sum[r], 1);
      sum[r] += ptx::shfl_xor(sum[r], 2);
    }
  }
};

}  // namespace sarathi
