// csrc/cuda/fragment.cuh against CuTe's layouts, at compile time (tests/test_cuda_layouts.py). PLANT shifts one of them.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/swizzle_layout.hpp>

#include "cuda/fragment.cuh"

#ifndef PLANT
#define PLANT 0
#endif

namespace sarathi {
using namespace cute;

template <int kHeadDim>
constexpr bool swizzle_is_cutes() {
  constexpr int kShift = kHeadDim == 64 ? 3 : kHeadDim == 128 ? 4 : 5;
  const auto tile = composition(Swizzle<3, 3, kShift>{}, Layout<Shape<_16, Int<kHeadDim>>, Stride<Int<kHeadDim>, _1>>{});
  for (int row = 0; row < 16; ++row)
    for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) {
      if (swizzled<kHeadDim>(row, chunk) + (PLANT == 1) != 2 * int(tile(row, 8 * chunk))) return false;
      if (swizzled<kHeadDim>(row, chunk) != (swizzled<kHeadDim>(row, chunk % 2) ^ 16 * (chunk - chunk % 2))) return false;
    }
  return true;
}
static_assert(swizzle_is_cutes<64>() && swizzle_is_cutes<128>() && swizzle_is_cutes<256>(), "swizzle");

using Product = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;  // operands as (lane, value) -> m + 16 k, n + 8 k, m + 16 n

// Register r of ldmatrix: matrix r, whose rows lanes 8 r .. 8 r + 7 address; a lane gets two neighbours of row lane / 4.
constexpr bool operand_a_is_cutes() {
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      for (int e = 0; e < 2; ++e) {
        const ChunkPlace from = a_address(8 * r + lane / 4);
        if (from.row + 16 * (from.chunk * 8 + lane % 4 * 2 + e) + (PLANT == 2) != Product::ALayout{}(lane, 2 * r + e)) return false;
      }
  return true;
}
static_assert(operand_a_is_cutes(), "A through ldmatrix");

constexpr bool operand_b_is_cutes() {
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      for (int e = 0; e < 2; ++e) {
        const int want = Product::BLayout{}(lane, r % 2 * 2 + e), second = r / 2 * 8;  // registers 2 and 3: the second B
        const ChunkPlace plain = b_address(8 * r + lane / 4), trans = b_trans_address(8 * r + lane % 4 * 2 + e);
        if (plain.row - second + 8 * (plain.chunk * 8 + lane % 4 * 2 + e) + (PLANT == 3) != want) return false;
        if (trans.chunk * 8 + lane / 4 - second + 8 * trans.row + (PLANT == 4) != want) return false;
      }
  return true;
}
static_assert(operand_b_is_cutes(), "B through ldmatrix");

constexpr bool accumulators_are_cutes() {
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < 2; ++e) {
        const int place = accumulator_row(lane, half) + 16 * (accumulator_column(lane) + e);
        if (place + (PLANT == 5) != Product::CLayout{}(lane, 2 * half + e)) return false;
        // Two fragments of weights side by side are an A operand as they lie: registers half and half + 2.
        if (place != Product::ALayout{}(lane, 2 * half + e)) return false;
        if (place + 128 != Product::ALayout{}(lane, 2 * (half + 2) + e)) return false;
      }
  return true;
}
static_assert(accumulators_are_cutes(), "accumulators");

}  // namespace sarathi
