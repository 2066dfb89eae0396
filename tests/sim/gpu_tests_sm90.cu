// The sm_90a kernels on a GPU, behind one C function. Built and called by test_sim_sm90.py.
#include "gpu_arrays.h"
#include "kernels_sm90.cuh"
#include "planted_sm90.cuh"

using namespace sarathi::testing;

// Not run here: that the warp-specialised kernel compiles is what counts.
template __global__ void sarathi::testing::product_sm90<Sm90Bug::kNone>(const ProductSm90, const __grid_constant__ CUtensorMap,
                                                                        const __grid_constant__ CUtensorMap,
                                                                            const __grid_constant__ CUtensorMap);

// What a tensor map describes: an input (or -1: the output) of 16-bit elements. rank 0: no map.
struct Tensor {
  int which, rank, swizzle;
  uint64_t dims[5], strides[5];
  uint32_t box[5];
};

namespace {

int encode(CUtensorMap* map, void* base, const Tensor& t) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return -2;
  static constexpr CUtensorMapSwizzle kSwizzle[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, t.rank, base, reinterpret_cast<const cuuint64_t*>(t.dims),
          reinterpret_cast<const cuuint64_t*>(t.strides), t.box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzle[t.swizzle], CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace

// Returns a cudaError_t (or CUresult of the map's encoding), or -1 for a kernel that is not in the table.
extern "C" int sarathi_gpu_test_sm90(const char* name, const void* const* inputs, const size_t* input_bytes, int num_inputs,
                                     void* out, size_t out_bytes, const int* n, const Tensor* tensor, int grid, int block,
                                     size_t smem_bytes) {
  void (*kernel)(Args, CUtensorMap) = nullptr;
#define ENTRY(candidate) \
  if (std::strcmp(name, #candidate) == 0) kernel = candidate;
  SARATHI_TEST_KERNELS_SM90(ENTRY)
#undef ENTRY
  if (kernel == nullptr) return -1;
  DeviceArrays arrays(inputs, input_bytes, num_inputs, out, out_bytes, n);
  CUtensorMap map{};
  if (tensor->rank > 0) {
    void* base = tensor->which < 0 ? arrays.args.out : const_cast<void*>(arrays.args.in[tensor->which]);
    if (const int error = encode(&map, base, *tensor); error != 0) return error;
  }
  DeviceArrays::launch(kernel, grid, block, smem_bytes, arrays.args, map);
  return arrays.finish();
}
