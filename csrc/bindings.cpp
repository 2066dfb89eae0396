// Where Python meets the host planner and the CPU backend. Raw pointers and sizes; shapes and dtypes were checked above.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/cpu.h"
#include "cpu/decoder.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "plan.h"

namespace py = pybind11;
using namespace sarathi;

namespace {

template <typename T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

Plan& make_plan_from_python(const py::tuple& c, uintptr_t cu_seqlens_q, uintptr_t seqused_k, uintptr_t block_table,
                            int64_t block_table_stride, int32_t batch, int32_t max_pages) {
  // One plan object per thread, used again: its vectors keep their memory, so a step allocates nothing.
  thread_local Plan plan;
  int32_t f[8];
  for (int i = 0; i < 8; ++i) f[i] = c[i].cast<int32_t>();
  const PlanConfig config{f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]};
  make_plan(config, {pointer<const int32_t>(cu_seqlens_q), pointer<const int32_t>(seqused_k),
                     pointer<const int32_t>(block_table), block_table_stride, batch, max_pages}, plan);
  return plan;
}

// counts | work items | merge items
void write_tables(const Plan& plan, uintptr_t destination) {
  auto* p = pointer<char>(destination);
  std::memcpy(p, &plan.counts, sizeof plan.counts);
  p += sizeof plan.counts;
  std::memcpy(p, plan.items.data(), plan.items.size() * sizeof(WorkItem));
  p += plan.items.size() * sizeof(WorkItem);
  std::memcpy(p, plan.merges.data(), plan.merges.size() * sizeof(MergeItem));
}

// (smallest, largest) of [count] integers of 4 or 8 bytes, count > 0.
template <class Int>
std::pair<int64_t, int64_t> range_of(const Int* values, int64_t count) {
  Int low = values[0], high = values[0];
  for (int64_t i = 1; i < count; ++i) low = std::min(low, values[i]), high = std::max(high, values[i]);
  return {low, high};
}

std::pair<int64_t, int64_t> value_range(uintptr_t values, int64_t count, int64_t itemsize) {
  return itemsize == 8 ? range_of(pointer<const int64_t>(values), count) : range_of(pointer<const int32_t>(values), count);
}

// An argument block as Python packed it (struct.Struct in backends/cpu.py), field by field as in params.h.
template <class Params>
Params unpack(const py::bytes& packed) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != sizeof(Params))
    throw std::invalid_argument("argument block of " + std::to_string(size) + " bytes, want " + std::to_string(sizeof(Params)) +
                                ": backends/cpu.py and params.h disagree");
  Params params;
  std::memcpy(&params, data, sizeof params);
  return params;
}

template <class Params, void (*op)(const Params&, int)>
void run(const py::bytes& packed, int threads) {
  const Params params = unpack<Params>(packed);
  py::gil_scoped_release release;
  op(params, threads);
}

void run_decoder(const py::bytes& params, const py::bytes& qkv, const py::bytes& o, const py::bytes& gate_up, const py::bytes& down,
                 const py::bytes& head, const py::bytes& append, const py::bytes& attention, int threads) {
  const cpu::DecoderOps ops{unpack<cpu::LinearParams>(qkv), unpack<cpu::LinearParams>(o), unpack<cpu::LinearParams>(gate_up),
                            unpack<cpu::LinearParams>(down), unpack<cpu::LinearParams>(head), unpack<AppendKvParams>(append),
                            unpack<AttentionParams>(attention)};
  const auto p = unpack<cpu::DecoderParams>(params);
  py::gil_scoped_release release;
  cpu::decoder(p, ops, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Host planner and CPU kernels of sarathi_kernels";
  // The draft is this thread's: valid until its next make_plan.
  py::class_<Plan>(m, "PlanDraft")
      .def_property_readonly("num_items", [](const Plan& p) { return p.counts.num_items; })
      .def_property_readonly("num_merges", [](const Plan& p) { return p.counts.num_merges; })
      .def_property_readonly("num_partial_rows", [](const Plan& p) { return p.counts.num_partial_rows; })
      .def_readonly("total_q", &Plan::total_q)
      .def_readonly("max_page", &Plan::max_page)
      .def("write", &write_tables);
  m.def("make_plan", &make_plan_from_python, py::return_value_policy::reference);

  m.def("value_range", &value_range);

  m.def("cpu_attention", &run<AttentionParams, cpu::attention>);
  m.def("cpu_append_kv", &run<AppendKvParams, cpu::append_kv>);
  m.def("cpu_merge_states", &run<MergeParams, cpu::merge_states>);
  m.def("cpu_linear", &run<cpu::LinearParams, cpu::linear>);
  m.def("cpu_decoder", &run_decoder);
  m.def("cpu_has_linear", &cpu::has_linear);
  m.def("cpu_isa", [] { return kernels().name; });
  m.def("cpu_set_isa", &set_isa);
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* isa : available_isas()) names.push_back(isa->name);
    return names;
  });
}
