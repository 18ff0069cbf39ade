// What every binding file offers to module.cpp, and the checks they share. Tensors cross as addresses and sizes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>

#include "ops.h"

namespace taylorkern {

using Address = std::uintptr_t;

void bind_cpu(pybind11::module_& module);

template <class Enum>
Enum checked(const char* name, int code, int count) {
  if (code < 0 || code >= count) {
    throw pybind11::value_error(std::string("taylorkern: unknown ") + name + " code " + std::to_string(code));
  }
  return static_cast<Enum>(code);
}

// dtypes: how many codes of Dtype are known, from the first
inline Shape checked_shape(int64_t N, int64_t C, int64_t S, int layout, int dtype, int dtypes) {
  for (const int64_t size : {N, C, S}) {
    if (size < 0) throw pybind11::value_error("taylorkern: a size is negative: " + std::to_string(size));
  }
  constexpr int64_t most = std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(double));
  if (C && S && N > most / C / S) throw pybind11::value_error("taylorkern: the sizes overflow");
  return {N, C, S, checked<Layout>("layout", layout, 2), checked<Dtype>("dtype", dtype, dtypes)};
}

inline Activation checked_activation(int code) { return checked<Activation>("activation", code, 6); }

inline void* optional(Address address) { return reinterpret_cast<void*>(address); }

// The address of a tensor of `elements`
inline void* required(const char* name, Address address, int64_t elements) {
  if (address == 0 && elements > 0) throw pybind11::value_error(std::string("taylorkern: null pointer for ") + name);
  return optional(address);
}

}  // namespace taylorkern
