#define BNB_TARGET portable
#include "../simd/portable.h"

#include "../generic/table.h"

const bnb::Kernels bnb::portable_kernels = bnb::portable::kTable;
const bnb::Backward bnb::portable_backward = bnb::portable::gemm_4bit_backward;
