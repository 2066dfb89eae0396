// A warp-specialised matrix product with one bug planted in it, or none: one thread of a producer warpgroup brings stages of
// a and b by TMA, a consumer warpgroup multiplies them by wgmma, and the result leaves by TMA.
// c[64, 128] = a[64, k] b[128, k]^T, bfloat16 in, float32 out.
#pragma once
#include "cuda/ptx_sm90.cuh"

namespace sarathi::testing {

enum class Sm90Bug : int {
  kNone,
  kExpectsTooFewBytes,      // the phase ends while bytes are under way
  kExpectsTooManyBytes,
  kNoWaitForFree,           // refills a stage that may still be read
  kWrongParity,
  kReleasesBeforeWait,      // wgmma still reads the stage
  kWaitsForTooLittle,       // reads accumulators of the last group early
  kNoWgmmaFence,
  kNoProxyFence,            // results written by st.shared, read by TMA
  kNoInitFence,
  kNoBarrierAfterInit,
  kFreeCountsOneWarp,       // a stage counts as free when the first warp is done with it
  kTileMisaligned,
  kWrongStride,             // of the descriptor of b
  kNoSwizzle,               // of the descriptors only
  kOneWarpFewer,            // a warp skips the last wgmma
  kStoreNotWaitedFor,
  kTooManyRegisters,
  kWrongCoordinate,
  kBarrierOverwritten,
};

struct ProductSm90 { int k; };

constexpr int kStages = 3, kABytes = 64 * 128, kBBytes = 128 * 128, kStageBytes = kABytes + kBBytes, kCBytes = 64 * 128 * 4;
constexpr int kSm90SharedBytes = kStages * kStageBytes + kCBytes + kStages * 16;

template <Sm90Bug kBug>
__global__ void product_sm90(const ProductSm90 p, const __grid_constant__ CUtensorMap map_a,
    const __grid_constant__ CUtensorMap map_b,
                             const __grid_constant__ CUtensorMap map_c) {
  unsigned char* const shared = ptx::dynamic_smem();
  const uint32_t smem = ptx::shared_address(shared), staged_c = smem + kStages * kStageBytes;
  const uint32_t full = staged_c + kCBytes, free = full + kStages * 8;
  const int thread = threadIdx.x, stages = p.k / 64;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);
      ptx::mbarrier_init(free + s * 8, kBug == Sm90Bug::kFreeCountsOneWarp ? 32 : 128);
    }
    if (kBug != Sm90Bug::kNoInitFence) ptx::mbarrier_fence_init();
  }
  if (kBug != Sm90Bug::kNoBarrierAfterInit) __syncthreads();

  if (thread < 128) {
    ptx::register_dealloc<40>();
    if (thread != 0) return;
    for (int i = 0; i < stages; ++i) {
      const int slot = i % kStages, round = i / kStages;
      const uint32_t a = smem + slot * kStageBytes + (kBug == Sm90Bug::kTileMisaligned ? 64 : 0);
      const uint32_t b = smem + slot * kStageBytes + kABytes;
      if (round > 0 && kBug != Sm90Bug::kNoWaitForFree) ptx::mbarrier_wait(free + slot * 8, (round - 1) & 1);
      const int off = kBug == Sm90Bug::kExpectsTooFewBytes ? -128 : kBug == Sm90Bug::kExpectsTooManyBytes ? 128 : 0;
      ptx::mbarrier_arrive_expect_tx(full + slot * 8, kStageBytes + off);
      ptx::tma_load_2d(a, &map_a, full + slot * 8, i * 64, 0);
      ptx::tma_load_2d(b, &map_b, full + slot * 8, kBug == Sm90Bug::kWrongCoordinate ? i * 64 + 8 : i * 64, 0);
    }
    return;
  }

  if (kBug == Sm90Bug::kTooManyRegisters) ptx::register_alloc<224>();  // 128 each at first, 88 given back
  else ptx::register_alloc<208>();
  const int warp = thread / 32 % 4, lane = thread % 32;
  const auto swizzle = kBug == Sm90Bug::kNoSwizzle ? ptx::Swizzle::kNone : ptx::Swizzle::k128;
  float acc[64];
  for (int i = 0; i < stages; ++i) {
    const int slot = i % kStages, round = i / kStages;
    ptx::mbarrier_wait(full + slot * 8, (kBug == Sm90Bug::kWrongParity ? round + 1 : round) & 1);
    if (kBug == Sm90Bug::kBarrierOverwritten && i == 1 && thread == 128)
      ptx::st_shared(reinterpret_cast<int*>(shared + (full + slot * 8 - smem)), 0);
    if (kBug != Sm90Bug::kNoWgmmaFence) ptx::wgmma_fence();
    for (int step = 0; step < 4; ++step) {
      if (kBug == Sm90Bug::kOneWarpFewer && warp == 3 && i == stages - 1 && step == 3) continue;
      const uint64_t a = ptx::matrix_descriptor(smem + slot * kStageBytes + step * 32, 16, 1024, swizzle);
      const uint64_t b = ptx::matrix_descriptor(smem + slot * kStageBytes + kABytes + step * 32, 16,
          kBug == Sm90Bug::kWrongStride ? 2048 : 1024, swizzle);
      ptx::wgmma_ss<__nv_bfloat16, 128>(acc, a, b, i > 0 || step > 0);
    }
    ptx::wgmma_commit();
    if (kBug == Sm90Bug::kReleasesBeforeWait) ptx::mbarrier_arrive(free + slot * 8);
    if (kBug != Sm90Bug::kWaitsForTooLittle || i + 1 < stages) ptx::wgmma_wait<0>();
    if (kBug != Sm90Bug::kReleasesBeforeWait) ptx::mbarrier_arrive(free + slot * 8);
  }

  // Four boxes of 32 columns, each [64, 32] floats.
  auto* c = reinterpret_cast<float*>(shared + kStages * kStageBytes);
  for (int i = 0; i < 64; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    ptx::st_shared(c + column / 32 * 64 * 32 + row * 32 + column % 32, acc[i]);
  }
  if (kBug == Sm90Bug::kWaitsForTooLittle) ptx::wgmma_wait<0>();
  if (kBug != Sm90Bug::kNoProxyFence) ptx::fence_proxy_async();
  ptx::bar_sync(1, 128);
  if (thread != 128) return;
  for (int box = 0; box < 4; ++box) ptx::tma_store_2d(&map_c, staged_c + box * 64 * 32 * 4, box * 32, 0);
  ptx::bulk_commit();
  if (kBug != Sm90Bug::kStoreNotWaitedFor) ptx::bulk_wait<0>();
}

#define SARATHI_PLANTED_SM90(X) \
  X(None) X(ExpectsTooFewBytes) X(ExpectsTooManyBytes) X(NoWaitForFree) X(WrongParity) X(ReleasesBeforeWait) X(WaitsForTooLittle) \
  X(NoWgmmaFence) X(NoProxyFence) X(NoInitFence) X(NoBarrierAfterInit) X(FreeCountsOneWarp) X(TileMisaligned) X(WrongStride) \
  X(NoSwizzle) X(OneWarpFewer) X(StoreNotWaitedFor) X(TooManyRegisters) X(WrongCoordinate) X(BarrierOverwritten)

}  // namespace sarathi::testing
