// What the CPU's kernel module has besides the kernels: its threads and its instruction sets.
#include "../csrc_shared/bind.h"
#include "dispatch.h"
#include "threads.h"

namespace bnb {

void bind_extras(Module& m) {
  choose_isa();
  m.bind<&set_openmp>("set_openmp",
                      "Run on the OpenMP runtime that this library uses; RuntimeError where it has none.");
  m.bind<&openmp_path>("openmp_path", "The file of that runtime, None before set_openmp.");
  m.bind<&isas_built>("isas_built", "Names of the instruction sets in this build, ascending.");
  m.bind<&isas_available>("isas_available", "Those that this machine can run.");
  m.bind<&isa>("isa", "The instruction set that serves.");
  m.bind<&set_isa>("set_isa", "Choose it; ValueError for a name not available.");
}

}  // namespace bnb
