#define BNB_TARGET avx2
#include "../simd/avx2.h"

#include "../generic/table.h"

const bnb::Kernels bnb::avx2_kernels = bnb::avx2::kTable;
const bnb::Backward bnb::avx2_backward = bnb::avx2::gemm_4bit_backward;
