// What the machine and its system can do.
#pragma once

#include "../csrc_shared/kernels.h"

namespace bnb {

#if defined(__x86_64__)
bool has_avx2();
bool has_avx512();
bool has_avx512_vnni();
bool has_avx512_bf16();
bool has_amx();
#elif defined(__aarch64__)
bool has_neon_dotprod();
bool has_neon_i8mm();
#endif

// Whether the machine multiplies in this half precision, and torch's matmul with it, at more than the rate of
// f32. Never for f32.
bool multiplies(DType dtype);

}  // namespace bnb
