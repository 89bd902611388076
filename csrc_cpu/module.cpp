// What the CPU's kernel module has besides the kernels: its threads and its instruction sets.
#include <pybind11/stl.h>

#include "dispatch.h"
#include "threads.h"

namespace bnb {

void bind_extras(pybind11::module_& m) {
  choose_isa();
  m.def("set_openmp", &set_openmp, pybind11::arg("libtorch_cpu_path"),
        "Run on the OpenMP runtime that this library uses; RuntimeError where it has none.");
  m.def("openmp_path", &openmp_path, "The file of that runtime, None before set_openmp.");
  m.def("isas_built", &isas_built, "Names of the instruction sets in this build, ascending.");
  m.def("isas_available", &isas_available, "Those that this machine can run.");
  m.def("isa", &isa, "The instruction set that serves.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Choose it; ValueError for a name not available.");
}

}  // namespace bnb
