// Launch settings, buffers and totals between Python and the simulator: what the modules that bind kernels share.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "sim/machine.h"
#include "sim/memory.h"
#include "sim/profile.h"

namespace sarathi::sim {
namespace py = pybind11;

inline dim3 dim3_from(const py::handle& value) {
  if (py::isinstance<py::int_>(value)) return dim3(value.cast<unsigned>());
  unsigned d[3] = {1, 1, 1};
  int i = 0;
  for (const auto& item : value.cast<py::tuple>()) {
    if (i == 3) throw py::value_error("a grid or block has at most three dimensions");
    d[i++] = item.cast<unsigned>();
  }
  return dim3(d[0], d[1], d[2]);
}

// The keyword arguments of a launch onto `config`. Raises: TypeError for one that is unknown.
inline void configure(Config& config, const py::kwargs& settings) {
  for (const auto& [key, value] : settings) {
    const auto name = key.cast<std::string>();
    if (name == "grid") config.grid = dim3_from(value);
    else if (name == "block") config.block = dim3_from(value);
    else if (name == "smem_bytes") config.smem_bytes = value.cast<size_t>();
    else if (name == "seed") config.seed = value.cast<uint64_t>();
    else if (name == "arch") config.arch = value.cast<int>();
    else if (name == "num_sms") config.num_sms = value.cast<int>();
    else if (name == "ctas_per_sm") config.ctas_per_sm = value.cast<int>();
    else if (name == "registers_per_thread") config.registers_per_thread = value.cast<int>();
    else if (name == "check_global") config.check_global = value.cast<bool>();
    else if (name == "check_races") config.check_races = value.cast<bool>();
    else if (name == "profile") config.profile = value.cast<bool>();
    else if (name == "hang_seconds") config.hang_seconds = value.cast<int>();
    else if (name == "livelock_polls") config.livelock_polls = value.cast<int64_t>();
    else if (name == "completion") {
      const auto mode = value.cast<std::string>();
      if (mode == "late") config.completion = Completion::kLate;
      else if (mode == "eager") config.completion = Completion::kEager;
      else if (mode == "random") config.completion = Completion::kRandom;
      else throw py::value_error("completion must be late, eager or random, got " + mode);
    } else {
      throw py::type_error("unknown launch setting " + name);
    }
  }
}

inline py::dict to_dict(const Stats& s) {
  py::dict d;
  d["global_to_shared_bytes"] = s.global_to_shared_bytes;
  d["shared_to_global_bytes"] = s.shared_to_global_bytes;
  d["shared_load_bytes"] = s.shared_load_bytes;
  d["shared_store_bytes"] = s.shared_store_bytes;
  d["ldmatrix_wavefronts"] = s.ldmatrix_wavefronts;
  d["ldmatrix_conflicts"] = s.ldmatrix_conflicts;
  d["mma_flops"] = s.mma_flops;
  d["barriers"] = s.barriers;
  d["warp_collectives"] = s.warp_collectives;
  d["atomics"] = s.atomics;
  d["polls"] = s.polls;
  d["switches"] = s.switches;
  d["ctas"] = s.ctas;
  if (machine.config.profile) {  // {"file:line kind": {...}}
    py::dict lines;
    for (const auto& [line, t] : profile_totals()) {
      py::dict entry;
      entry["requests"] = t.requests;
      entry["bytes"] = t.bytes;
      entry["wavefronts"] = t.wavefronts;
      entry["conflicts"] = t.conflicts;
      entry["sectors"] = t.sectors;
      lines[py::str(line)] = entry;
    }
    d["lines"] = lines;
  }
  return d;
}

// Registers buffers for the length of a launch: a sequence of (address, bytes, name, writable).
class RegisteredBuffers {
 public:
  explicit RegisteredBuffers(const py::iterable& buffers) {
    for (const auto& entry : buffers) {
      const auto b = entry.cast<py::tuple>();
      auto* begin = reinterpret_cast<void*>(b[0].cast<uintptr_t>());
      global_memory().add(begin, b[1].cast<size_t>(), b[2].cast<std::string>(), b[3].cast<bool>());
      added_.push_back(begin);
    }
  }
  ~RegisteredBuffers() {
    for (void* begin : added_) global_memory().remove(begin);
  }
  RegisteredBuffers(const RegisteredBuffers&) = delete;
  RegisteredBuffers& operator=(const RegisteredBuffers&) = delete;

 private:
  std::vector<void*> added_;
};

// Guarded memory for Python: numpy views it through the buffer protocol. Registered while it lives.
inline void bind_common(py::module_& m) {
  py::register_exception<Error>(m, "SimulatorError", PyExc_RuntimeError);
  py::class_<GuardedBuffer<unsigned char>>(m, "GuardedBuffer", py::buffer_protocol(), py::module_local())
      .def(py::init<std::string, size_t, bool>(), py::arg("name"), py::arg("bytes"), py::arg("writable") = true)
      .def_buffer([](const GuardedBuffer<unsigned char>& b) { return py::buffer_info(b.data(), static_cast<ssize_t>(b.size()),
          false); })
      .def_property_readonly("address",
          [](const GuardedBuffer<unsigned char>& b) { return reinterpret_cast<uintptr_t>(b.data()); });
}

}  // namespace sarathi::sim
