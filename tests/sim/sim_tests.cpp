// The module _sim_tests: the test kernels of this folder in the simulator. Inputs are copied into guarded buffers, so that
// plain loads past their ends are found too.
#include <pybind11/stl.h>

#include <map>

#include "sim/python.h"

#include "kernels.cuh"
#include "planted.cuh"

namespace py = pybind11;
using namespace sarathi;
using namespace sarathi::testing;
using Bytes = sim::GuardedBuffer<unsigned char>;

namespace {

std::unique_ptr<Bytes> guarded(const std::string& name, const py::buffer& from, bool writable) {
  const auto info = from.request();
  auto bytes = std::make_unique<Bytes>(name, static_cast<size_t>(info.size * info.itemsize), writable);
  std::memcpy(bytes->data(), info.ptr, bytes->size());
  return bytes;
}

void copy_back(const Bytes& bytes, const py::buffer& to) { std::memcpy(to.request(true).ptr, bytes.data(), bytes.size()); }

py::dict run(const std::string& name, const py::list& inputs, const py::buffer& out, const std::vector<int>& n, const py::kwargs& settings) {
  static const std::map<std::string, void (*)(Args)> kKernels = {
#define ENTRY(kernel) {#kernel, kernel},
      SARATHI_TEST_KERNELS(ENTRY)
#undef ENTRY
  };
  sim::Config config;
  sim::configure(config, settings);
  Args args{};
  std::vector<std::unique_ptr<Bytes>> held;
  for (size_t i = 0; i < inputs.size(); ++i) {
    held.push_back(guarded("input " + std::to_string(i), inputs[i].cast<py::buffer>(), false));
    args.in[i] = held.back()->data();
  }
  const auto result = guarded("output", out, true);
  args.out = result->data();
  std::copy(n.begin(), n.end(), args.n);
  const sim::Stats stats = sim::launch(config, kKernels.at(name), args);
  copy_back(*result, out);
  return sim::to_dict(stats);
}

py::dict run_product(const std::string& bug, const py::buffer& a, const py::buffer& b, const py::buffer& c, int k, int rows, const py::kwargs& settings) {
  static const std::map<std::string, void (*)(Product)> kKernels = {
#define ENTRY(bug) {#bug, product<k##bug>},
      SARATHI_PLANTED(ENTRY)
#undef ENTRY
  };
  sim::Config config;
  config.block = dim3(128);
  config.smem_bytes = 4 * kTileBytes;
  sim::configure(config, settings);
  const auto ga = guarded("a", a, false), gb = guarded("b", b, false), gc = guarded("c", c, true);
  const sim::GuardedBuffer<float> partials("partials", config.grid.x * 64 * 64);
  const sim::GuardedBuffer<int> counter("counter", 1);
  std::memset(partials.data(), 0xff, partials.size() * sizeof(float));
  counter[0] = 0;
  const Product p{reinterpret_cast<const __nv_bfloat16*>(ga->data()), reinterpret_cast<const __nv_bfloat16*>(gb->data()),
                  partials.data(), reinterpret_cast<float*>(gc->data()), counter.data(), k, rows};
  const sim::Stats stats = sim::launch(config, kKernels.at(bug), p);
  copy_back(*gc, c);
  auto dict = sim::to_dict(stats);
  dict["counter"] = counter[0];
  return dict;
}

}  // namespace

PYBIND11_MODULE(_sim_tests, m) {
  sim::bind_common(m);
  m.def("run", &run);
  m.def("product", &run_product);
}
