// One small kernel per instruction or pattern. The same kernels run in the simulator (sim_tests.cpp) and on a GPU
// (gpu_tests.cu), on the same inputs, held against the same expected values (tests/test_sim_instructions.py).
#pragma once
#include <cstdint>

#include "cuda/ptx.cuh"

namespace sarathi::testing {

struct Args {
  const void* in[3];
  void* out;
  int n[4];
};

template <typename T>
__device__ __forceinline__ const T* input(const Args& a, int i) { return static_cast<const T*>(a.in[i]); }
template <typename T>
__device__ __forceinline__ T* output(const Args& a) { return static_cast<T*>(a.out); }

// in: words of shared memory, byte offset for each lane; n: bytes, matrices (2 or 4), transposed; out [32, matrices]
__global__ void ldmatrix(const Args a) {
  auto* smem = ptx::dynamic_smem<uint32_t>();
  const int lane = threadIdx.x;
  for (int i = lane; i < a.n[0] / 4; i += 32) ptx::st_shared(smem + i, input<uint32_t>(a, 0)[i]);
  __syncwarp();
  const uint32_t row = ptx::shared_address(smem) + input<int>(a, 1)[lane];
  uint32_t four[4], two[2];
  if (a.n[1] == 4) {
    if (a.n[2]) ptx::ldmatrix_x4_trans(four, row);
    else ptx::ldmatrix_x4(four, row);
    for (int i = 0; i < 4; ++i) output<uint32_t>(a)[lane * 4 + i] = four[i];
  } else {
    if (a.n[2]) ptx::ldmatrix_x2_trans(two, row);
    else ptx::ldmatrix_x2(two, row);
    for (int i = 0; i < 2; ++i) output<uint32_t>(a)[lane * 2 + i] = two[i];
  }
}

// in: registers of a [32, 4], b [32, 2], c [32, 4]; out [32, 4]; T = n[0] ? bfloat16 : half
__global__ void mma(const Args a) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float d[4];
  for (int i = 0; i < 4; ++i) ra[i] = input<uint32_t>(a, 0)[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = input<uint32_t>(a, 1)[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = input<float>(a, 2)[lane * 4 + i];
  if (a.n[0]) ptx::mma_m16n8k16<__nv_bfloat16>(d, ra, rb);
  else ptx::mma_m16n8k16<__half>(d, ra, rb);
  for (int i = 0; i < 4; ++i) output<float>(a)[lane * 4 + i] = d[i];
}

// in: bytes, src_bytes of each thread; n[0]: 4, 8 or 16 bytes a copy; out: the bytes of all threads
__global__ void cp_async(const Args a) {
  auto* smem = ptx::dynamic_smem<unsigned char>();
  const int size = a.n[0], i = threadIdx.x;
  for (int w = i; w < static_cast<int>(blockDim.x) * size / 4; w += blockDim.x) ptx::st_shared(reinterpret_cast<uint32_t*>(smem) + w, 0xEEEEEEEEu);
  __syncthreads();
  const uint32_t to = ptx::shared_address(smem) + i * size;
  const unsigned char* from = input<unsigned char>(a, 0) + i * size;
  const int src_bytes = input<int>(a, 1)[i];
  if (size == 16) ptx::cp_async_16(to, from, src_bytes);
  else if (size == 8) ptx::cp_async_8(to, from, src_bytes);
  else ptx::cp_async_4(to, from, src_bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int w = i; w < static_cast<int>(blockDim.x) * size / 4; w += blockDim.x)
    output<uint32_t>(a)[w] = ptx::ld_shared(reinterpret_cast<uint32_t*>(smem) + w);
}

// in: values [32], source or distance per lane; n: 0 idx, 1 xor, 2 up, 3 down; segment width; out [32]
__global__ void shuffle(const Args a) {
  const int lane = threadIdx.x, value = input<int>(a, 0)[lane], by = input<int>(a, 1)[lane], width = a.n[1];
  int got = 0;
  if (a.n[0] == 0) got = __shfl_sync(0xffffffffu, value, by, width);
  if (a.n[0] == 1) got = __shfl_xor_sync(0xffffffffu, value, by, width);
  if (a.n[0] == 2) got = __shfl_up_sync(0xffffffffu, value, by, width);
  if (a.n[0] == 3) got = __shfl_down_sync(0xffffffffu, value, by, width);
  output<int>(a)[lane] = got;
}

// in: predicates [32]; out [32, 3]: ballot, any, all. The odd lanes then vote among themselves: out[96 + lane].
__global__ void vote(const Args a) {
  const int lane = threadIdx.x, predicate = input<int>(a, 0)[lane];
  output<uint32_t>(a)[lane * 3] = ptx::ballot(predicate);
  output<uint32_t>(a)[lane * 3 + 1] = ptx::any(predicate);
  output<uint32_t>(a)[lane * 3 + 2] = ptx::all(predicate);
  output<uint32_t>(a)[96 + lane] = 0;
  if (lane % 2) output<uint32_t>(a)[96 + lane] = __ballot_sync(0xaaaaaaaau, predicate);
}

// in: float32 [n[0]]; out: bfloat16 bits [n], half bits [n]
__global__ void narrow(const Args a) {
  for (int i = threadIdx.x; i < a.n[0]; i += blockDim.x) {
    const __nv_bfloat16 b = __float2bfloat16_rn(input<float>(a, 0)[i]);
    const __half h = __float2half_rn(input<float>(a, 0)[i]);
    memcpy(output<uint16_t>(a) + i, &b, 2);
    memcpy(output<uint16_t>(a) + a.n[0] + i, &h, 2);
  }
}

// in: bits [n[0]]; out: float32 of them as bfloat16 [n], as half [n]
__global__ void widen(const Args a) {
  for (int i = threadIdx.x; i < a.n[0]; i += blockDim.x) {
    __nv_bfloat16 b;
    __half h;
    memcpy(&b, input<uint16_t>(a, 0) + i, 2);
    memcpy(&h, input<uint16_t>(a, 0) + i, 2);
    output<float>(a)[i] = __bfloat162float(b);
    output<float>(a)[a.n[0] + i] = __half2float(h);
  }
}

// in: float32 [n[0]]; out [4, n]: exp2, log2, tanh, reciprocal
__global__ void approximate(const Args a) {
  for (int i = threadIdx.x; i < a.n[0]; i += blockDim.x) {
    const float x = input<float>(a, 0)[i];
    output<float>(a)[i] = ptx::exp2_approx(x);
    output<float>(a)[a.n[0] + i] = ptx::log2_approx(x);
    output<float>(a)[2 * a.n[0] + i] = ptx::tanh_approx(x);
    output<float>(a)[3 * a.n[0] + i] = ptx::rcp_approx(x);
  }
}

// Warp 0 produces n[0] values through a slot of shared memory, warp 1 consumes them: two named barriers, "full" and "free".
__global__ void named_barriers(const Args a) {
  auto* slot = ptx::dynamic_smem<int>();
  constexpr int kFull = 1, kFree = 2;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < a.n[0]; ++i) {
      if (i > 0) ptx::bar_sync(kFree, 64);
      ptx::st_shared(slot + lane, input<int>(a, 0)[i] + lane);
      ptx::bar_arrive(kFull, 64);
    }
  } else {
    for (int i = 0; i < a.n[0]; ++i) {
      ptx::bar_sync(kFull, 64);
      output<int>(a)[i * 32 + lane] = ptx::ld_shared(slot + (lane + 1) % 32);
      if (i + 1 < a.n[0]) ptx::bar_arrive(kFree, 64);
    }
  }
}

// Every CTA writes a partial sum; the last to arrive adds them all. in: ints [gridDim * blockDim];
// out: total, counter (0 before and after), then partials [gridDim, blockDim]
__global__ void last_arriver(const Args a) {
  auto* is_last = ptx::dynamic_smem<int>();
  int* const total = output<int>(a);
  int* const counter = total + 1;
  int* const partials = total + 2;
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::st_global(partials + at, input<int>(a, 0)[at]);
  __syncthreads();
  if (threadIdx.x == 0) ptx::st_shared(is_last, ptx::atomic_add_acq_rel(counter, 1) == static_cast<int>(gridDim.x) - 1 ? 1 : 0);
  __syncthreads();
  if (!ptx::ld_shared(is_last)) return;
  int sum = 0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x * blockDim.x); i += blockDim.x) sum += ptx::ld_global(partials + i);
  ptx::atomic_add(total, sum);
  if (threadIdx.x == 0) ptx::st_global(counter, 0);
}

// A relay: CTA i waits for CTA i - 1, so all must be alive at once. out: flag, then the order in which they ran.
__global__ void relay(const Args a) {
  int* const flag = output<int>(a);
  const int block = gridDim.x - 1 - blockIdx.x;  // the last CTA starts
  if (threadIdx.x == 0) {
    while (ptx::ld_acquire(flag) != block) {}
    ptx::st_global(flag + 1 + block, static_cast<int>(blockIdx.x));
    ptx::st_release(flag, block + 1);
  }
}

// out: sum of thread numbers, largest thread number, a counter raised by one per thread through compare-and-swap
__global__ void atomics(const Args a) {
  int* const out = output<int>(a);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::atomic_add(out, i);
  ptx::atomic_max(out + 1, i);
  for (int seen = ptx::ld_volatile(out + 2);;) {
    const int before = ptx::atomic_cas(out + 2, seen, seen + 1);
    if (before == seen) break;
    seen = before;
  }
}

// Every lane reads its own 4-byte word of shared memory and writes the word n[0] further on (0: its own), with no barrier
// between the lanes. n[1]: bytes by which lanes lie apart. out: what it read.
__global__ void own_words(const Args a) {
  char* const smem = ptx::dynamic_smem<char>();
  const auto word = [&](int lane) { return reinterpret_cast<int*>(smem + lane % 32 * a.n[1]); };
  const int lane = threadIdx.x;
  ptx::st_shared(word(lane), lane);
  __syncwarp();
  const int value = ptx::shfl(ptx::ld_shared(word(lane)), lane);  // all have read before the first writes
  ptx::st_shared(word(lane + a.n[0]), value + 1);
  output<int>(a)[lane] = value;
}

#define SARATHI_TEST_KERNELS(X) \
  X(ldmatrix) X(mma) X(cp_async) X(shuffle) X(vote) X(narrow) X(widen) X(approximate) X(named_barriers) X(last_arriver) X(relay) X(atomics) \
  X(own_words)

}  // namespace sarathi::testing
