#define BNB_TARGET avx512
#include "../simd/avx512.h"

#include "../generic/table.h"

const bnb::Kernels bnb::avx512_kernels = bnb::avx512::kTable;
const bnb::Backward bnb::avx512_backward = bnb::avx512::gemm_4bit_backward;
