// Where Python meets the CUDA library: pointers as ints, sizes, a stream. Shapes, dtypes and strides were checked above.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/api.h"

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
}
