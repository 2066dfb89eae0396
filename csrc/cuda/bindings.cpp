// Where Python meets the CUDA library: pointers as ints, sizes, a stream. Shapes, dtypes and strides were checked above.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/api.h"
#include "packed.h"

// The tests build this file again, on functions that only take notes (tests/sim/recorded_launches.cpp).
#ifndef SARATHI_CUDA_MODULE
#define SARATHI_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace sarathi;

namespace {

void check(int code, const char* what) {
  if (code == 0) return;
  throw std::runtime_error(std::string(what) + ": " + sarathi_cuda_error(code) + " (CUDA error " + std::to_string(code) + ")");
}

int version(int (*get)(int*), const char* what) {
  int value = 0;
  check(get(&value), what);
  return value;
}

// While alive, `device` is the current one.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) { check(sarathi_cuda_use_device(device, &previous_), "set device"); }
  ~OnDevice() {
    int ignored;
    if (previous_ != device_) sarathi_cuda_use_device(previous_, &ignored);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, previous_ = 0;
};

template <typename T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// What all layers of a step share: the plan's tables, sizes, strides and scalars. A layer brings its tensors' addresses.
class AttentionPlan {
 public:
  AttentionPlan(const py::bytes& params, int num_blocks, int device)
      : params_(unpack<AttentionParams>(params)), num_blocks_(num_blocks), device_(device) {
    const OnDevice guard(device_);
    check(sarathi_cuda_prepare_attention_sm80(&params_), "attention");
  }

  // 0 stands for a tensor that is not given.
  void run(uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t out, uintptr_t lse, uintptr_t sinks, uintptr_t tree_mask,
           uintptr_t stream) {
    params_.q = pointer<const void>(q);
    params_.k_cache = pointer<const void>(k_cache);
    params_.v_cache = pointer<const void>(v_cache);
    params_.out = pointer<void>(out);
    params_.lse = pointer<float>(lse);
    params_.sinks = pointer<const float>(sinks);
    params_.tree_mask = pointer<const int64_t>(tree_mask);
    const OnDevice guard(device_);
    check(sarathi_cuda_attention_sm80(&params_, num_blocks_, pointer<void>(stream)), "attention");
  }

 private:
  AttentionParams params_;
  int num_blocks_, device_;
};

// An op whose argument block is packed anew for every call.
template <typename Params>
auto op(int (*launch)(const Params*, void*), const char* what) {
  return [launch, what](const py::bytes& params, int device, uintptr_t stream) {
    const auto p = unpack<Params>(params);
    const OnDevice guard(device);
    check(launch(&p, pointer<void>(stream)), what);
  };
}

}  // namespace

PYBIND11_MODULE(SARATHI_CUDA_MODULE, m) {
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
  py::class_<AttentionPlan>(m, "AttentionPlan").def(py::init<const py::bytes&, int, int>()).def("run", &AttentionPlan::run);
  m.def("plan", op(sarathi_cuda_plan, "plan"));
  m.def("append_kv", op(sarathi_cuda_append_kv, "append_kv"));
  m.def("merge_states", op(sarathi_cuda_merge_states, "merge_states"));
}
