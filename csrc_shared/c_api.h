// What the plain C symbols of c_api.cpp do that depends on whose memory they are given.
#pragma once

#include "kernels.h"

namespace bnb {

// out[M, N] = A[M, K] @ W[N, K]^T, where `code` f32[16] are the values of W's codes.
void gemm_4bit_of_code(DType dtype, int64_t M, int64_t N, int64_t K, const void* A, const uint8_t* packed,
                       const float* absmax, const float* code, int64_t blocksize, void* out, Stream stream);

}  // namespace bnb
