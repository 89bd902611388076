// Managed memory for Python: addresses as integers.
#pragma once

#include <pybind11/pybind11.h>

#include "managed_memory.h"

namespace bnb {

inline void bind_managed_memory(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("allocate_managed", &allocate_managed, pybind11::arg("bytes"), no_gil);
  m.def("free_managed", &free_managed, pybind11::arg("address"), no_gil);
  m.def(
      "prefetch_managed",
      [](uintptr_t address, size_t bytes, bool to_host, uintptr_t stream) {
        prefetch_managed(address, bytes, to_host, reinterpret_cast<Stream>(stream));
      },
      no_gil);
}

}  // namespace bnb
