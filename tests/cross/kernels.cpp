// Runs the CPU's kernels of one level on fixed inputs: two processors that print the same hashes compute the
// same, and products are held to their bounds. Without a level, prints those that the machine can run.
//
//     kernels [LEVEL [OPENMP]]      OPENMP: the library of a runtime whose threads take part
//
// Built with BNB_ALL_LEVELS it chooses levels as the library does in Python; otherwise the portable one is
// linked alone.

#include "../../csrc_cpu/threads.h"
#include "exact.h"
#include "products.h"

#if defined(BNB_ALL_LEVELS)
#include "../../csrc_cpu/dispatch.h"
#else
#include "../../csrc_cpu/targets/targets.h"
#endif

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

bool load(const char* library) {
#if defined(_WIN32)
  return LoadLibraryA(library);
#else
  return dlopen(library, RTLD_NOW | RTLD_GLOBAL);
#endif
}

}  // namespace

int main(int argc, char** argv) {
#if defined(BNB_ALL_LEVELS)
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
  if (argc == 3) {
    if (!load(argv[2])) return 3;
    bnb::set_openmp(argv[2]);
  }
  print_hashes(kernels);
  print_checks(kernels);
}
