// gemm_4bit of a few rows by planes of bytes.
#pragma once

#include "byte_planes.h"

namespace bnb::BNB_TARGET {
namespace {

struct PlanesGemm4bit {
  static constexpr int64_t kMostPasses = 2;

  // Groups begin with a block or in the middle of one.
  static bool serves(const Matrix& A, const Weight4bit& w) {
    return w.K % kGroup == 0 && passes(A) <= kMostPasses;
  }

  static void run(const Matrix& A, const Weight4bit& w, const Destination& destination) {
    with_type(A.dtype, destination.out, [&](auto* y) {
      using T = Pointee<decltype(y)>;
      const T* const a = A.as<const T>();
      const int64_t most = ceil_div(A.rows, passes(A));
      for (int64_t row = 0; row < A.rows; row += most) {
        const int64_t rows = min(A.rows - row, most);
        const Gemm4bit<T> gemm{a + row * w.K, rows, w, w.format().codebook, destination.result<T>(row)};
        if (A.dtype == DType::bf16 && w.K >= kLeastTerms) {
          gemv_4bit<PlaneProducts<BFloat16Planes>>(gemm);
        } else {
          gemv_4bit<PlaneProducts<FloatPlanes>>(gemm);
        }
      }
    });
  }

 private:
  static int64_t passes(const Matrix& A) { return ceil_div(A.rows, PlaneProducts<FloatPlanes>::kMostRows); }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
