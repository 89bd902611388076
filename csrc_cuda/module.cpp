// What a GPU's kernel module has besides the kernels: versions, and managed memory.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "check.h"
#include "managed_memory.h"

namespace bnb {
namespace {

// The version of the driver's API, such as 13000; 0 where there is no driver.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

}  // namespace

void bind_extras(pybind11::module_& m) {
  m.def("driver_version", &driver_version, "The version of the driver's API; 0 without a driver.");
  m.def("runtime_version", &runtime_version, "The version of the runtime in this module.");
  m.attr("archs") = BNB_GPU_ARCHS;
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("allocate_managed", &allocate_managed, no_gil);
  m.def("free_managed", &free_managed, no_gil);
  m.def(
      "prefetch_managed",
      [](uintptr_t address, size_t bytes, bool to_host, uintptr_t stream) {
        prefetch_managed(address, bytes, to_host, reinterpret_cast<Stream>(stream));
      },
      no_gil);
}

}  // namespace bnb
