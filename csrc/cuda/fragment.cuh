// Where matrix elements lie: in shared memory as rows of 16-byte chunks, in registers as mma.m16n8k16 wants its operands and
// leaves its sums. Arithmetic of our own, held to CuTe's layouts by tests/cuda_layouts.cu.
//
// Why not CuTe itself (CUTLASS 4.2.0, nvcc 13.0, measured on the attention kernel): evaluating cute::Layout and cute::Swizzle
// where `swizzled` stands below, in units of elements, chunks or bytes, makes the machine code 4 to 13 % longer and spills at
// head_dim 128, on sm_80, sm_90a or both (12 to 84 bytes), because the compiler can no longer see that a step along the row
// is one XOR. It adds 5 s to 18 s of compilation, which would be bearable; full tiled copies and products take ten times
// ours. On the host, which the simulator needs, CuTe's headers also want the toolkit's.
#pragma once
#include "work.cuh"

namespace sarathi {

// Byte offset of 16-byte chunk `chunk` of row `row` in a shared-memory tile: chunks are permuted within the row so that
// the eight rows ldmatrix reads at once lie in different banks. For an even number 2 d of chunks further on, flip its bits in
// the result: swizzled(row, 2 d + c) = swizzled(row, c) ^ 32 d, which costs one instruction and no register.
template <int kHeadDim>
SARATHI_HD constexpr int swizzled(int row, int chunk) {
  static_assert(kHeadDim % 64 == 0, "a row is a whole number of 128-byte lines");
  return row * kHeadDim * 2 + ((chunk ^ (row & 7)) << 4);
}

// The row and chunk of a tile that a lane gives ldmatrix.x4: for A [16, 16]; for two B [16, 8] whose columns are the tile's
// rows; for two whose rows are (.trans).
struct ChunkPlace { int row, chunk; };
SARATHI_HD constexpr ChunkPlace a_address(int lane) { return {lane % 16, lane / 16}; }
SARATHI_HD constexpr ChunkPlace b_address(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }
SARATHI_HD constexpr ChunkPlace b_trans_address(int lane) { return {lane % 16, lane / 16}; }

// Row and (first of two) columns of a lane's accumulators 2 half and 2 half + 1 in [16, 8].
SARATHI_HD constexpr int accumulator_row(int lane, int half) { return half * 8 + lane / 4; }
SARATHI_HD constexpr int accumulator_column(int lane) { return lane % 4 * 2; }

}  // namespace sarathi
