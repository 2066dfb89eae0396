// The sm_90a counterpart of kernels.cuh: bulk copies and wgmma, for the simulator and for a GPU.
#pragma once
#include "cuda/ptx_sm90.cuh"
#include "kernels.cuh"

namespace sarathi::testing {

// One box of a tensor map into shared memory, and its bytes from there as they lie. n: rank, bytes of the box, x0, x1; in 0:
// x2, x3. out: the bytes.
__global__ void tma_load(const Args a, const __grid_constant__ CUtensorMap map) {
  auto* smem = ptx::dynamic_smem<uint32_t>();
  const int bytes = a.n[1];
  const uint32_t box = ptx::shared_address(smem), bar = box + bytes;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int x0 = a.n[2], x1 = a.n[3], x2 = input<int>(a, 0)[0], x3 = input<int>(a, 0)[1];
    ptx::mbarrier_arrive_expect_tx(bar, bytes);
    if (a.n[0] == 2) ptx::tma_load_2d(box, &map, bar, x0, x1);
    if (a.n[0] == 3) ptx::tma_load_3d(box, &map, bar, x0, x1, x2);
    if (a.n[0] == 4) ptx::tma_load_4d(box, &map, bar, x0, x1, x2, x3);
  }
  ptx::mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) output<uint32_t>(a)[i] = ptx::ld_shared(smem + i);
}

// Bytes into shared memory, and from there by one box into the tensor that the map describes. Arguments as tma_load; in 1:
// the bytes; out is what the map points to.
__global__ void tma_store(const Args a, const __grid_constant__ CUtensorMap map) {
  auto* smem = ptx::dynamic_smem<uint32_t>();
  for (int i = threadIdx.x; i < a.n[1] / 4; i += blockDim.x) ptx::st_shared(smem + i, input<uint32_t>(a, 1)[i]);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint32_t box = ptx::shared_address(smem);
  const int x0 = a.n[2], x1 = a.n[3], x2 = input<int>(a, 0)[0], x3 = input<int>(a, 0)[1];
  if (a.n[0] == 2) ptx::tma_store_2d(&map, box, x0, x1);
  if (a.n[0] == 3) ptx::tma_store_3d(&map, box, x0, x1, x2);
  if (a.n[0] == 4) ptx::tma_store_4d(&map, box, x0, x1, x2, x3);
  ptx::bulk_commit();
  ptx::bulk_wait<0>();
}

// How the operands of `wgmma` lie in shared memory.
struct WgmmaPlaces {
  int a_start, a_leading, a_stride, a_step;  // bytes; `step` from one 16 of k to the next
  int b_start, b_leading, b_stride, b_step;
  int swizzle, a_mn_major, b_mn_major, a_in_registers, bfloat16;
};

template <typename T, int kN, ptx::Major kMajorA, ptx::Major kMajorB>
__device__ __forceinline__ void wgmma_steps(const Args& a, const WgmmaPlaces& w, uint32_t smem, float (&d)[kN / 2]) {
  const auto swizzle = static_cast<ptx::Swizzle>(w.swizzle);
  uint32_t fragments[16][4];
  for (int step = 0; step < a.n[1]; ++step)
    for (int i = 0; i < 4; ++i)
      fragments[step][i] = w.a_in_registers ? input<uint32_t>(a, 2)[(step * 128 + threadIdx.x) * 4 + i] : 0;
  ptx::wgmma_fence();
  for (int step = 0; step < a.n[1]; ++step) {
    const uint64_t da = ptx::matrix_descriptor(smem + w.a_start + step * w.a_step, w.a_leading, w.a_stride, swizzle);
    const uint64_t db = ptx::matrix_descriptor(smem + w.b_start + step * w.b_step, w.b_leading, w.b_stride, swizzle);
    if (w.a_in_registers) ptx::wgmma_rs<T, kN, kMajorB>(d, fragments[step], db, step > 0);
    else ptx::wgmma_ss<T, kN, kMajorA, kMajorB>(d, da, db, step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

template <typename T, int kN>
__device__ __forceinline__ void wgmma_of_type(const Args& a, const WgmmaPlaces& w, uint32_t smem) {
  using ptx::Major;
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = -1.0f;
  if (w.a_mn_major && w.b_mn_major) wgmma_steps<T, kN, Major::kMn, Major::kMn>(a, w, smem, d);
  else if (w.a_mn_major) wgmma_steps<T, kN, Major::kMn, Major::kK>(a, w, smem, d);
  else if (w.b_mn_major) wgmma_steps<T, kN, Major::kK, Major::kMn>(a, w, smem, d);
  else wgmma_steps<T, kN, Major::kK, Major::kK>(a, w, smem, d);
  for (int i = 0; i < kN / 2; ++i) output<float>(a)[threadIdx.x * (kN / 2) + i] = d[i];
}

// in: words of shared memory, WgmmaPlaces, registers of a [steps, 128, 4]; n: bytes, steps; out [128, kN / 2]
template <int kN>
__device__ __forceinline__ void wgmma_of_width(const Args& a) {
  auto* smem = ptx::dynamic_smem<uint32_t>();
  for (int i = threadIdx.x; i < a.n[0] / 4; i += blockDim.x) ptx::st_shared(smem + i, input<uint32_t>(a, 0)[i]);
  ptx::fence_proxy_async();
  __syncthreads();
  const WgmmaPlaces& w = *input<WgmmaPlaces>(a, 1);
  if (w.bfloat16) wgmma_of_type<__nv_bfloat16, kN>(a, w, ptx::shared_address(smem));
  else wgmma_of_type<__half, kN>(a, w, ptx::shared_address(smem));
}
__global__ void wgmma_8(const Args a, const __grid_constant__ CUtensorMap) { wgmma_of_width<8>(a); }
__global__ void wgmma_64(const Args a, const __grid_constant__ CUtensorMap) { wgmma_of_width<64>(a); }
__global__ void wgmma_128(const Args a, const __grid_constant__ CUtensorMap) { wgmma_of_width<128>(a); }

#define SARATHI_TEST_KERNELS_SM90(X) X(tma_load) X(tma_store) X(wgmma_8) X(wgmma_64) X(wgmma_128)

}  // namespace sarathi::testing
