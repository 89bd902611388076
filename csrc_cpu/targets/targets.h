// One table of kernels per instruction set that this build holds.
#pragma once

#include "../../csrc_shared/kernels.h"

namespace bnb {

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels amx_kernels;
#endif

}  // namespace bnb
