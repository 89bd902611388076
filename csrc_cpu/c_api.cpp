#include "../csrc_shared/c_api.h"

namespace bnb {

void gemm_4bit_of_code(DType dtype, int64_t M, int64_t N, int64_t K, const void* A, const uint8_t* packed,
                       const float* absmax, const float* code, int64_t blocksize, void* out, Stream stream) {
  // An ascending codebook starts with nf4's -1; fp4's first code is 0.
  const QuantType quant_type = code[0] < 0 ? QuantType::nf4 : QuantType::fp4;
  const BlockScales scales{absmax, nullptr, nullptr, nullptr, nullptr, 0};
  kernels().gemm_4bit(A, dtype, M, N, K, packed, scales, blocksize, quant_type, nullptr, out, stream);
}

}  // namespace bnb
