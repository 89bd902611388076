// What the code for each instruction set of this build exports.
#pragma once

#include "../../csrc_shared/kernels.h"

namespace bnb {

struct Target {
  Kernels kernels;
  // gemm_4bit where `code` f32[16] holds what the weight's codes stand for, whatever its format.
  void (*gemm_4bit_of_code)(const Matrix& A, const Weight4bit& weight, const float* code, const void* bias,
                            void* out);
};

extern const Target portable_target;
#if defined(__x86_64__)
extern const Target avx2_target;
extern const Target avx512_target;
extern const Target avx512_vnni_target;
extern const Target avx512_bf16_target;
extern const Target amx_target;
#elif defined(__aarch64__)
extern const Target neon_target;
extern const Target neon_dotprod_target;
extern const Target neon_i8mm_target;
#endif

}  // namespace bnb
