// A pipelined matrix product with one bug planted in it, or none. c[64, 64] = a[64, k] b[64, k]^T, four warps, a ring of
// two stages filled by cp.async, one CTA per slice of k; the CTAs add up through partials and a last arriver.
#pragma once
#include "cuda/ptx.cuh"

namespace sarathi::testing {

enum Bug : int {
  kNone,
  kWaitForTooLittle,        // wait_group leaves one group more under way
  kNoBarrierAfterWait,      // a thread's wait says nothing about the copies of others
  kNoBarrierBeforeRefill,   // write after read: the next copy into a stage that others still read
  kLdmatrixNextRow,         // in bounds, wrong data
  kNoSwizzle,               // of the reads only
  kLdmatrixMisaligned,
  kSourceOutOfBounds,       // the last stage of the last slice reads past a
  kSharedOutOfBounds,       // a third stage that was not asked for
  kPlainStoreOutOfShared,   // not through a wrapper
  kPlainLoadOutOfGlobal,    // not through a wrapper
  kCopyMisaligned,
  kBarrierInHalfAWarp,
  kBarrierCountsTooMany,
  kShuffleInHalfAWarp,
  kNoFence,                 // the last arriver's atomic without release
  kNobodySetsTheFlag,
  kNoZeroFill,              // rows of c's padding read shared memory that nobody wrote
  kWriteReadOnly,
  kBarrierFromTwoPlaces,
  kLoopsForever,            // on a plain load: nothing the simulator could see
};

struct Product {
  const __nv_bfloat16 *a, *b;  // [64, k]
  float* partials;             // [gridDim.x, 64, 64]
  float* c;                    // [64, 64]
  int* counter;
  int k, rows;                 // rows of a that exist; the others count as zero
};

constexpr int kStageK = 32, kRowBytes = kStageK * 2, kTileBytes = 64 * kRowBytes;

// Rows of 64 bytes: four chunks of 16, permuted by the row pair so that eight rows of one column of chunks fill all banks.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) { return row * kRowBytes + (chunk ^ (row / 2 % 4)) * 16; }

template <Bug kBug>
__global__ void product(const Product p) {
  const uint32_t smem = ptx::shared_address(ptx::dynamic_smem());
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slice = p.k / gridDim.x, k_begin = blockIdx.x * slice, stages = slice / kStageK;

  const auto load = [&](int stage) {
    const int at = kBug == kSharedOutOfBounds ? stage % 3 : stage % 2;
    for (int i = thread; i < 64 * 4; i += 128) {
      const int row = i / 4, chunk = i % 4;
      const int64_t shift = kBug == kSourceOutOfBounds ? 64 * p.k : kBug == kCopyMisaligned ? 4 : 0;
      const int64_t from = static_cast<int64_t>(row) * p.k + k_begin + stage * kStageK + chunk * 8;
      const bool there = row < p.rows;
      if (there || kBug != kNoZeroFill)
        ptx::cp_async_16(smem + at * 2 * kTileBytes + chunk_offset(row, chunk), p.a + (there ? from : 0) + shift, there ? 16 : 0);
      ptx::cp_async_16(smem + at * 2 * kTileBytes + kTileBytes + chunk_offset(row, chunk), p.b + from);
    }
  };

  float acc[8][4] = {};
  load(0);
  ptx::cp_async_commit();
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) load(stage + 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kBug == kWaitForTooLittle ? 2 : 1>();
    if (kBug == kBarrierInHalfAWarp) {
      if (lane < 16) __syncthreads();
    } else if (kBug == kBarrierFromTwoPlaces) {
      if (lane < 16) __syncthreads();
      else __syncthreads();
    } else if (kBug == kBarrierCountsTooMany) {
      if (warp != 3) ptx::bar_sync(1, 128);
    } else if (kBug != kNoBarrierAfterWait) {
      __syncthreads();
    }
    const uint32_t tile = smem + stage % 2 * 2 * kTileBytes;
    for (int k = 0; k < kStageK / 16; ++k) {
      uint32_t a[4];
      const int row = warp * 16 + lane % 16, chunk = k * 2 + lane / 16;
      const int read_row = kBug == kLdmatrixNextRow ? (row + 1) % 64 : row;
      const uint32_t offset = kBug == kNoSwizzle ? read_row * kRowBytes + chunk * 16 : chunk_offset(read_row, chunk);
      ptx::ldmatrix_x4(a, tile + offset + (kBug == kLdmatrixMisaligned ? 8 : 0));
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, tile + kTileBytes + chunk_offset(n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        ptx::mma_m16n8k16<__nv_bfloat16>(acc[2 * n], a, b[0], b[1]);
        ptx::mma_m16n8k16<__nv_bfloat16>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
    if (kBug != kNoBarrierBeforeRefill) __syncthreads();
  }

  if (kBug == kPlainStoreOutOfShared && thread == 0) ptx::dynamic_smem()[4 * kTileBytes + 8] = 1;
  if (kBug == kPlainLoadOutOfGlobal && thread == 0) acc[0][0] += __bfloat162float(p.b[64 * p.k + 16]);
  if (kBug == kShuffleInHalfAWarp && lane < 16) acc[0][0] += 0 * ptx::shfl_xor(acc[0][0], 1);
  if (kBug == kLoopsForever)
    while (*const_cast<const volatile int*>(p.counter) >= 0) {}
  if (kBug == kWriteReadOnly && thread == 0) ptx::st_global(const_cast<__nv_bfloat16*>(p.a), p.b[0]);

  float* partial = p.partials + blockIdx.x * 64 * 64;
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) ptx::st_global(partial + (warp * 16 + lane / 4 + i / 2 * 8) * 64 + n * 8 + lane % 4 * 2 + i % 2,
        acc[n][i]);
  __syncthreads();
  auto* is_last = ptx::dynamic_smem<int>();
  if (thread == 0) {
    const int before = kBug == kNoFence ? ptx::atomic_add(p.counter, 1) : ptx::atomic_add_acq_rel(p.counter, 1);
    ptx::st_shared(is_last, before == static_cast<int>(gridDim.x) - 1 ? 1 : 0);
  }
  if (kBug == kNobodySetsTheFlag)
    while (ptx::ld_acquire(p.counter) != static_cast<int>(gridDim.x) + 1) {}
  __syncthreads();
  if (!ptx::ld_shared(is_last)) return;
  for (int i = thread; i < 64 * 64; i += 128) {
    float sum = 0;
    for (int s = 0; s < static_cast<int>(gridDim.x); ++s) sum += ptx::ld_global(p.partials + s * 64 * 64 + i);
    ptx::st_global(p.c + i, sum);
  }
  if (thread == 0) ptx::st_global(p.counter, 0);
}

#define SARATHI_PLANTED(X) \
  X(None) X(WaitForTooLittle) X(NoBarrierAfterWait) X(NoBarrierBeforeRefill) X(LdmatrixNextRow) X(NoSwizzle) X(LdmatrixMisaligned) \
  X(SourceOutOfBounds) X(SharedOutOfBounds) X(PlainStoreOutOfShared) X(PlainLoadOutOfGlobal) X(CopyMisaligned) X(BarrierInHalfAWarp) \
  X(BarrierCountsTooMany) X(ShuffleInHalfAWarp) X(NoFence) X(NobodySetsTheFlag) X(NoZeroFill) X(WriteReadOnly) X(BarrierFromTwoPlaces) X(LoopsForever)

}  // namespace sarathi::testing
