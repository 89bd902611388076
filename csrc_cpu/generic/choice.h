// Which kernel serves a product: of those that fit, the first that is asked. Kernels that only some
// instruction sets have tell by serves(...), of the arguments that decide, and take them all by run(...).
#pragma once

#include "backward.h"
#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

// What stands for a kernel that an instruction set lacks.
struct NoKernel {
  template <class... Arguments>
  static bool serves(const Arguments&...) {
    return false;
  }
  template <class... Arguments>
  static void run(const Arguments&...) {}
};

struct NoneOfItsOwn {
  using Encoding = BlockwiseEncoding;
  using FormatEncoding = Encoding4bit;
  using Gemm4bit = NoKernel;
  using Backward4bit = NoKernel;
  using Int8 = NoKernel;
};

template <class Own>
void multiply_by_choice(const Matrix& A, const Weight4bit& weight, const Destination& destination) {
  if (Own::serves(A, weight)) {
    Own::run(A, weight, destination);
  } else {
    multiply_4bit(A, weight, weight.format().codebook, destination);
  }
}

template <class Own>
void differentiate_by_choice(const Matrix& dY, const Weight4bit& weight, void* dA) {
  if (Own::serves(dY, weight)) {
    Own::run(dY, weight, dA);
  } else {
    backward_of_4bit(dY, weight, dA);
  }
}

template <class Own>
Dense gemm_4bit(const Matrix& A, const Weight4bit& weight, const void* bias, void* out, Stream) {
  if (A.rows > 0 && weight.N > 0) multiply_by_choice<Own>(A, weight, {bias, out, weight.N});
  return Dense::nothing;
}

template <class Own>
Dense gemm_4bit_backward(const Matrix& dY, const Weight4bit& weight, void* dA, Stream) {
  if (!Own::serves(dY, weight) && dense_is_faster(dY)) return Dense::in_dtype;
  differentiate_by_choice<Own>(dY, weight, dA);
  return Dense::nothing;
}

Dense int8_linear_backward(const Matrix& dY, const Int8Weight& weight, void* dA, Stream) {
  if (dense_is_faster(dY)) return Dense::in_dtype;
  backward_of_int8(dY, weight, dA);
  return Dense::nothing;
}

template <class Dot, class Own>
void int8_linear_matmul(const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C, Stream) {
  if (Own::serves(A)) return Own::run(A, B, C);
  int8_multiply(DotBlock<Dot>{A, B}, A, B, C);
}

template <class Dot, class Own>
void int8_mixed_scaled_mm(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                          const Matrix& out, Stream) {
  if (Own::serves(product.A)) return Own::run(product, outliers, bias, out);
  int8_multiply_mixed(DotBlock<Dot>{product.A, product.B}, product, outliers, bias, out);
}

}  // namespace
}  // namespace bnb::BNB_TARGET
