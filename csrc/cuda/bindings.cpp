// Where Python meets the CUDA library: pointers as ints, sizes, a stream. Shapes, dtypes and strides were checked above.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/api.h"
#include "packed.h"

namespace py = pybind11;
using namespace sarathi;

namespace {

void check(int code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string(what) + ": " + sarathi_cuda_error(code) + " (CUDA error " + std::to_string(code) + ")");
}

int version(int (*get)(int*), const char* what) {
  int value = 0;
  check(get(&value), what);
  return value;
}

void* stream_of(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of sarathi_kernels";
  m.def("runtime_version", [] { return version(sarathi_cuda_runtime_version, "runtime version"); });
  m.def("driver_version", [] { return version(sarathi_cuda_driver_version, "driver version"); });
  // (count, why there are none)
  m.def("device_count", [] {
    int count = 0;
    const int code = sarathi_cuda_device_count(&count);
    return py::make_tuple(count, code ? sarathi_cuda_error(code) : "");
  });
  m.def("device_info", [](int device) {
    DeviceInfo info{};
    check(sarathi_cuda_device_info(device, &info), "device info");
    return py::make_tuple(info.compute_capability, info.num_sms, info.shared_bytes);
  });
  m.def("attention_sm80", [](const py::bytes& params, int num_blocks, uintptr_t stream) {
    const auto p = unpack<AttentionParams>(params);
    check(sarathi_cuda_attention_sm80(&p, num_blocks, stream_of(stream)), "attention");
  });
  m.def("plan", [](const py::bytes& params, uintptr_t stream) {
    const auto p = unpack<PlanParams>(params);
    check(sarathi_cuda_plan(&p, stream_of(stream)), "plan");
  });
  m.def("append_kv", [](const py::bytes& params, uintptr_t stream) {
    const auto p = unpack<AppendKvParams>(params);
    check(sarathi_cuda_append_kv(&p, stream_of(stream)), "append_kv");
  });
  m.def("merge_states", [](const py::bytes& params, uintptr_t stream) {
    const auto p = unpack<MergeParams>(params);
    check(sarathi_cuda_merge_states(&p, stream_of(stream)), "merge_states");
  });
}
