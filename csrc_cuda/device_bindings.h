// What every GPU's module has for Python besides the primitives, on hardware or simulated.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <vector>

#include "../csrc_shared/bind.h"
#include "gemm_4bit_kernels.h"
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
  m.attr("gemm_4bit_kernels") = pybind11::tuple(pybind11::cast(
      std::vector<std::string>(std::begin(kGemm4bitKernelNames), std::end(kGemm4bitKernelNames))));
  bind<&gpu::gemm_4bit_kernel>(
      m, "gemm_4bit_kernel", "Which of gemm_4bit_kernels serves products of A and the weight, by its place.");
  bind<&gpu::set_gemm_4bit_kernel>(m, "set_gemm_4bit_kernel",
                                   "The one at this place serves, wherever it takes the product; -1: as the "
                                   "table says. Gives the place before.");
}

}  // namespace bnb
