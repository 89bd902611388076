// What a simulated kernel module has besides the kernels: the settings of the simulator.
#include "../csrc_cuda/device_bindings.h"
#include "settings.h"

namespace bnb {

void bind_extras(Module& m) {
  bind_device_extras(m);
  m.bind<&simulator::set_warp_size>("set_warp_size", "32 or 64; ValueError for another number.");
  m.bind<&simulator::warp_size>("warp_size", "The lanes of a warp.");
  m.bind<&simulator::set_order>(
      "set_order",
      "The order of lanes and blocks: forward, reverse or shuffled:SEED; ValueError for another.");
  m.bind<&simulator::order>("order", "The order of lanes and blocks.");
  m.bind<&simulator::set_workers>(
      "set_workers", "The number of OS threads that run blocks; ValueError for a number that cannot be.");
  m.bind<&simulator::workers>("workers", "The number of OS threads that run blocks.");
  m.bind<&simulator::set_capturing>(
      "set_capturing",
      "Whether calls that no capture of a graph allows are refused; kernels run all the same.");
}

}  // namespace bnb
