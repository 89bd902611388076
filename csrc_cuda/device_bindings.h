// What every GPU's module has for Python besides the primitives, on hardware or simulated.
#pragma once

#include <iterator>
#include <string>
#include <vector>

#include "../csrc_shared/bind.h"
#include "gemm_4bit_kernels.h"
#include "managed_memory.h"
#include "operations.h"

namespace bnb {

// Managed memory has its addresses as integers, and so has a stream.
inline void bind_device_extras(Module& m) {
  m.bind<&allocate_managed>("allocate_managed");
  m.bind<&free_managed>("free_managed");
  m.bind<&prefetch_managed>("prefetch_managed");
  m.attribute("gemm_4bit_kernels",
              std::vector<std::string>(std::begin(kGemm4bitKernelNames), std::end(kGemm4bitKernelNames)));
  m.bind<&gpu::gemm_4bit_kernel>(
      "gemm_4bit_kernel", "Which of gemm_4bit_kernels serves products of A and the weight, by its place.");
  m.bind<&gpu::set_gemm_4bit_kernel>(
      "set_gemm_4bit_kernel",
      "The one at this place serves, wherever it takes the product; -1: as the "
      "table says. Gives the place before.");
}

}  // namespace bnb
