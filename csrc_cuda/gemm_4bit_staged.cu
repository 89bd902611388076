// The shapes of the kernel that keeps several steps of the weight under way: which of them there are.
#include "gemm_4bit_staged.h"

namespace bnb {
namespace {

template <class T, class Shape>
Gemm4bitRow<T> row() {
  return {fits_staged<T, Shape>, launch_gemm_4bit_staged<T, Shape>};
}

}  // namespace

template <class T>
Gemm4bitRow<T> staged_row([[maybe_unused]] Gemm4bitKernel kernel) {
  if constexpr (kMayHaveMma) {
    switch (kernel) {
      case Gemm4bitKernel::staged8_wide:
        return row<T, StagedShape<1, 16, 1, 4, 2>>();
      case Gemm4bitKernel::staged8_permuted:
        return row<T, StagedShape<1, 16, 1, 4, 2, 1>>();
      case Gemm4bitKernel::staged8_deep:
        return row<T, StagedShape<1, 16, 1, 2, 4>>();
      case Gemm4bitKernel::staged8_two:
        return row<T, StagedShape<1, 8, 2, 2, 3>>();
      case Gemm4bitKernel::staged16:
        return row<T, StagedShape<2, 8, 2, 2, 2>>();
      case Gemm4bitKernel::staged32:
        return row<T, StagedShape<4, 4, 3, 2, 2>>();
      case Gemm4bitKernel::staged48:
        return row<T, StagedShape<6, 8, 1, 2, 3>>();
      case Gemm4bitKernel::staged64:
        return row<T, StagedShape<8, 8, 1, 2, 3>>();
      default:
        break;
    }
  }
  return {nullptr, nullptr};
}

template Gemm4bitRow<__half> staged_row(Gemm4bitKernel kernel);
template Gemm4bitRow<__nv_bfloat16> staged_row(Gemm4bitKernel kernel);

}  // namespace bnb
