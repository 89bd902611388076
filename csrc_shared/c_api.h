// What the plain C symbols of c_api.cpp do that depends on whose memory they are given.
#pragma once

#include "kernels.h"

namespace bnb {

// gemm_4bit without a bias, where `code` f32[16] holds what the weight's codes stand for; its quant_type is
// not read.
void gemm_4bit_of_code(const Matrix& A, const Weight4bit& weight, const float* code, void* out,
                       Stream stream);

}  // namespace bnb
