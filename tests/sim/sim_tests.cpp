// The module _sim_tests: the test kernels of this folder in the simulator. Inputs are copied into guarded buffers, so that
// plain loads past their ends are found too.
#include <pybind11/stl.h>

#include <map>

#include "sim/python.h"

#include "kernels_sm90.cuh"
#include "planted.cuh"
#include "planted_sm90.cuh"

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

// An Args whose pointers lead to guarded copies.
struct Arguments {
  Args args{};
  std::vector<std::unique_ptr<Bytes>> inputs;
  std::unique_ptr<Bytes> out;

  Arguments(const py::list& from, const py::buffer& to, const std::vector<int>& n) : out(guarded("output", to, true)) {
    for (size_t i = 0; i < from.size(); ++i) {
      inputs.push_back(guarded("input " + std::to_string(i), from[i].cast<py::buffer>(), false));
      args.in[i] = inputs.back()->data();
    }
    args.out = out->data();
    std::copy(n.begin(), n.end(), args.n);
  }
};

sim::Config config_from(const py::kwargs& settings, sim::Config config = {}) {
  sim::configure(config, settings);
  return config;
}

py::dict run(const std::string& name, const py::list& inputs, const py::buffer& out, const std::vector<int>& n,
    const py::kwargs& settings) {
  static const std::map<std::string, void (*)(Args)> kKernels = {
#define ENTRY(kernel) {#kernel, kernel},
      SARATHI_TEST_KERNELS(ENTRY)
#undef ENTRY
  };
  const Arguments a(inputs, out, n);
  const sim::Stats stats = sim::launch(config_from(settings), kKernels.at(name), a.args);
  copy_back(*a.out, out);
  return sim::to_dict(stats);
}

// `tensor`: what the map describes: (input number or -1 for the output, element bytes, dims, strides, box, swizzle), or None.
py::dict run_sm90(const std::string& name, const py::list& inputs, const py::buffer& out, const std::vector<int>& n,
    const py::object& tensor,
                  const py::kwargs& settings) {
  static const std::map<std::string, void (*)(Args, CUtensorMap)> kKernels = {
#define ENTRY(kernel) {#kernel, kernel},
      SARATHI_TEST_KERNELS_SM90(ENTRY)
#undef ENTRY
  };
  const Arguments a(inputs, out, n);
  CUtensorMap map{};
  if (!tensor.is_none()) {
    const auto t = tensor.cast<py::tuple>();
    const int which = t[0].cast<int>();
    map = sim::encode_tensor_map(which < 0 ? a.out->data() : a.inputs[which]->data(), t[1].cast<int>(),
        t[2].cast<std::vector<uint64_t>>(),
                                 t[3].cast<std::vector<uint64_t>>(), t[4].cast<std::vector<uint32_t>>(),
                                     static_cast<sim::Swizzle>(t[5].cast<int>()));
  }
  sim::Config config;
  config.arch = 90;
  const sim::Stats stats = sim::launch(config_from(settings, config), kKernels.at(name), a.args, map);
  copy_back(*a.out, out);
  return sim::to_dict(stats);
}

py::dict run_product(const std::string& bug, const py::buffer& a, const py::buffer& b, const py::buffer& c, int k, int rows,
    const py::kwargs& settings) {
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

py::dict run_product_sm90(const std::string& bug, const py::buffer& a, const py::buffer& b, const py::buffer& c, int k,
    const py::kwargs& settings) {
  static const std::map<std::string, void (*)(ProductSm90, CUtensorMap, CUtensorMap, CUtensorMap)> kKernels = {
#define ENTRY(bug) {#bug, product_sm90<Sm90Bug::k##bug>},
      SARATHI_PLANTED_SM90(ENTRY)
#undef ENTRY
  };
  sim::Config config;
  config.grid = dim3(1);
  config.block = dim3(256);
  config.arch = 90;
  config.ctas_per_sm = 1;
  config.registers_per_thread = 128;
  config.smem_bytes = kSm90SharedBytes;
  sim::configure(config, settings);
  const auto ga = guarded("a", a, false), gb = guarded("b", b, false), gc = guarded("c", c, true);
  const uint64_t width = k, pitch = width * 2;
  const auto map = [](const Bytes& bytes, int element, uint64_t columns, uint64_t rows, uint64_t pitch_bytes, uint32_t box0,
      uint32_t box1, sim::Swizzle s) {
    return sim::encode_tensor_map(bytes.data(), element, {columns, rows}, {pitch_bytes}, {box0, box1}, s);
  };
  const sim::Stats stats = sim::launch(config, kKernels.at(bug), ProductSm90{k}, map(*ga, 2, width, 64, pitch, 64, 64,
      sim::Swizzle::k128),
                                       map(*gb, 2, width, 128, pitch, 64, 128, sim::Swizzle::k128),
                                       map(*gc, 4, 128, 64, 512, 32, 64, sim::Swizzle::kNone));
  copy_back(*gc, c);
  return sim::to_dict(stats);
}

}  // namespace

PYBIND11_MODULE(_sim_tests, m) {
  sim::bind_common(m);
  m.def("run", &run);
  m.def("run_sm90", &run_sm90);
  m.def("product", &run_product);
  m.def("product_sm90", &run_product_sm90);
}
