// The launch of the device planner.
#include "cuda/plan.cuh"

#include "cuda/api.h"

int sarathi_cuda_plan(const sarathi::PlanParams* p, void* stream) {
  using namespace sarathi::planner;
  static_assert(sizeof(Shared) <= 48 * 1024);
  plan_kernel<<<1, kThreads, sizeof(Shared), static_cast<cudaStream_t>(stream)>>>(*p);
  return cudaGetLastError();
}
