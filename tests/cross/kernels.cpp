// Runs the CPU's kernels of one level on fixed inputs: two processors that print the same hashes compute the
// same, and products are held to their bounds. Without a level, prints those that the machine can run.
//
// On aarch64 the library chooses levels as it does in Python; elsewhere only the portable one is linked.

#include "exact.h"
#include "products.h"

#if defined(__aarch64__)
#include "../../csrc_cpu/dispatch.h"
#else
#include "../../csrc_cpu/targets/targets.h"
#endif

int main(int argc, char** argv) {
#if defined(__aarch64__)
  if (argc == 1) {
    for (const std::string& name : bnb::isas_available()) std::puts(name.c_str());
    return 0;
  }
  bnb::set_isa(argv[1]);
  const bnb::Kernels& kernels = bnb::kernels();
#else
  if (argc == 1 || std::strcmp(argv[1], "portable") != 0) return 2;
  const bnb::Kernels& kernels = bnb::portable_target.kernels;
#endif
  print_hashes(kernels);
  print_checks(kernels);
}
