// What a simulated kernel module has besides the kernels: the settings of the simulator.
#include <pybind11/pybind11.h>

#include "../csrc_cuda/device_bindings.h"
#include "settings.h"

namespace bnb {

void bind_extras(pybind11::module_& m) {
  namespace py = pybind11;
  bind_device_extras(m);
  m.def("set_warp_size", &simulator::set_warp_size, py::arg("lanes"),
        "32 or 64; ValueError for another number.");
  m.def("warp_size", &simulator::warp_size, "The lanes of a warp.");
  m.def("set_order", &simulator::set_order, py::arg("order"),
        "The order of lanes and blocks: forward, reverse or shuffled:SEED; ValueError for another.");
  m.def("order", &simulator::order, "The order of lanes and blocks.");
  m.def("set_workers", &simulator::set_workers, py::arg("workers"),
        "The number of OS threads that run blocks; ValueError for a number that cannot be.");
  m.def("workers", &simulator::workers, "The number of OS threads that run blocks.");
  m.def("set_capturing", &simulator::set_capturing, py::arg("is_capturing"),
        "Whether calls that no capture of a graph allows are refused; kernels run all the same.");
}

}  // namespace bnb
