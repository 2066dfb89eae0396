// How a binding reads the argument blocks that Python packs (sarathi_kernels/backends/cuda.py).
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <string_view>

namespace sarathi {

// An argument block as Python packed it, field by field as in params.h.
template <typename Params>
Params unpack(const pybind11::bytes& packed) {
  const auto text = static_cast<std::string_view>(packed);
  if (text.size() != sizeof(Params))
    throw pybind11::value_error("argument block of " + std::to_string(text.size()) + " bytes, want " + std::to_string(sizeof(Params)));
  Params params;
  std::memcpy(&params, text.data(), sizeof params);
  return params;
}

}  // namespace sarathi
