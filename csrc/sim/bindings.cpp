// The module _sim: our CUDA kernels, launched in the simulator. One function per kernel, each as its launch in csrc/cuda
// would choose template arguments and shared memory; what is left to the caller are the grid and the simulator's settings.
#include "sim/python.h"

#include "cuda/append_kv.cuh"
#include "cuda/attention_sm80.cuh"
#include "cuda/merge.cuh"
#include "cuda/plan.cuh"
#include "packed.h"

namespace py = pybind11;
using namespace sarathi;

namespace {

template <typename Element>
sim::Stats attention_sm80(sim::Config& config, const AttentionParams& p) {
  const auto launch = [&](auto head_dim) {
    config.smem_bytes = sm80::shared_bytes<Element, head_dim>();
    return sim::launch(config, sm80::attention_kernel<Element, head_dim>, p);
  };
  switch (p.head_dim) {
    case 64: return launch(std::integral_constant<int, 64>{});
    case 128: return launch(std::integral_constant<int, 128>{});
    case 256: return launch(std::integral_constant<int, 256>{});
  }
  throw py::value_error("attention_sm80 has no head_dim " + std::to_string(p.head_dim));
}

// A kernel whose threads stride over their work: three blocks do any amount of it.
sim::Config strided_config(int threads, const py::kwargs& settings) {
  sim::Config config;
  config.grid = dim3(3);
  config.block = dim3(threads);
  sim::configure(config, settings);
  return config;
}

template <typename Element>
sim::Stats append_kv(const sim::Config& config, const AppendKvParams& p) {
  return append::wide(p) ? sim::launch(config, append::append_kv_kernel<Element, 8>, p)
                         : sim::launch(config, append::append_kv_kernel<Element, 1>, p);
}

template <typename Element>
sim::Stats merge_states(const sim::Config& config, const MergeParams& p) {
  return p.head_dim % 8 == 0 ? sim::launch(config, merge::merge_kernel<Element, 8>, p)
                             : sim::launch(config, merge::merge_kernel<Element, 1>, p);
}

}  // namespace

PYBIND11_MODULE(_sim, m) {
  m.doc() = "The CUDA kernels of sarathi_kernels, run on the CPU by the host simulator (csrc/sim)";
  sim::bind_common(m);
  // params: bytes of an AttentionParams; buffers: (address, bytes, name, writable) of everything it points to.
  m.def("attention_sm80", [](const py::bytes& params, int num_blocks, const py::iterable& buffers, const py::kwargs& settings) {
    const auto p = unpack<AttentionParams>(params);
    sim::Config config;
    config.grid = dim3(num_blocks);
    config.block = dim3(sm80::kThreads);
    config.ctas_per_sm = sm80::kCtasPerSm;
    sim::configure(config, settings);
    const sim::RegisteredBuffers registered(buffers);
    return sim::to_dict(p.dtype == DType::kBFloat16 ? attention_sm80<bfloat16>(config, p) : attention_sm80<float16>(config, p));
  });
  m.def("append_kv", [](const py::bytes& params, const py::iterable& buffers, const py::kwargs& settings) {
    const auto p = unpack<AppendKvParams>(params);
    const sim::Config config = strided_config(append::kThreads, settings);
    const sim::RegisteredBuffers registered(buffers);
    return sim::to_dict(p.dtype == DType::kBFloat16 ? append_kv<bfloat16>(config, p) : append_kv<float16>(config, p));
  });
  m.def("merge_states", [](const py::bytes& params, const py::iterable& buffers, const py::kwargs& settings) {
    const auto p = unpack<MergeParams>(params);
    const sim::Config config = strided_config(merge::kThreads, settings);
    const sim::RegisteredBuffers registered(buffers);
    return sim::to_dict(p.dtype == DType::kBFloat16 ? merge_states<bfloat16>(config, p) : merge_states<float16>(config, p));
  });
  m.def("plan", [](const py::bytes& params, const py::iterable& buffers, const py::kwargs& settings) {
    const auto p = unpack<PlanParams>(params);
    sim::Config config;
    config.grid = dim3(1);
    config.block = dim3(planner::kThreads);
    config.smem_bytes = sizeof(planner::Shared);
    sim::configure(config, settings);
    const sim::RegisteredBuffers registered(buffers);
    return sim::to_dict(sim::launch(config, planner::plan_kernel, p));
  });
}
