// What every GPU's module has for Python besides the primitives, on hardware or simulated.
#pragma once

#include <pybind11/pybind11.h>

#include "../csrc_shared/bind.h"
#include "managed_memory.h"
#include "operations.h"

namespace bnb {

// Managed memory has its addresses as integers.
inline void bind_device_extras(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("allocate_managed", &allocate_managed, pybind11::arg("bytes"), no_gil);
  m.def("free_managed", &free_managed, pybind11::arg("address"), no_gil);
  m.def(
      "prefetch_managed",
      [](uintptr_t address, size_t bytes, bool to_host, uintptr_t stream) {
        prefetch_managed(address, bytes, to_host, reinterpret_cast<Stream>(stream));
      },
      no_gil);
  bind<&gpu::takes_wgmma>(m, "takes_wgmma",
                          "Whether Hopper's own kernel takes products of A and the weight.");
  bind<&gpu::set_wgmma_rows>(m, "set_wgmma_rows",
                             "Up to how many rows of A gemm_4bit gives them to it; gives the number before.");
}

}  // namespace bnb
