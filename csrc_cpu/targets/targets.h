// One table of kernels per instruction set that this build holds.
#pragma once

#include "../../csrc_shared/kernels.h"

namespace bnb {

// dA[M, K] = dY[M, N] @ dequantized(packed)[N, K], both in `dtype`.
using Backward = void (*)(const void* dY, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
                          const BlockScales& scales, int64_t blocksize, QuantType quant_type, void* dA);

// The same on tiles; false, with nothing done, for what it does not serve.
using TileBackward = bool (*)(const void* dY, DType dtype, int64_t M, int64_t N, int64_t K,
                              const uint8_t* packed, const BlockScales& scales, int64_t blocksize,
                              QuantType quant_type, void* dA);

extern const Kernels portable_kernels;
extern const Backward portable_backward;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Backward avx2_backward;
extern const Kernels avx512_kernels;
extern const Backward avx512_backward;
extern const Kernels avx512_vnni_kernels;
extern const Backward avx512_vnni_backward;
extern const Kernels amx_kernels;
extern const Backward amx_backward;
extern const TileBackward amx_backward_on_tiles;
#endif

}  // namespace bnb
