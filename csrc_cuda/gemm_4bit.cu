// Products with a 4-bit weight (docs/SPEC.md section 3): which products each kernel takes, and its launch.
// gemm_4bit_choices.h says which one serves where several do.
#include <atomic>

#include "gemm_4bit_choices.h"
#include "gemm_4bit_mma.h"
#include "gemm_4bit_tiles.h"
#include "gemm_4bit_wgmma.h"
#include "gemv_4bit.h"
#include "operations.h"

namespace bnb {
namespace {

template <class Weights, class T>
void multiply_in_f32(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  if (gemm.M == 1) return launch_gemv_4bit<Weights, 1>(gemm, codebook, stream);
  if (gemm.M <= 8) return launch_gemv_4bit<Weights, 4>(gemm, codebook, stream);
  launch_gemm_4bit_tiles<Weights>(gemm, codebook, stream);
}

template <class T>
Gemm4bitRow<T> f32_row() {
  return {[](const Gemm4bit<T>&) { return true; },
          [](const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
            if (AlignedWeight::fits(gemm.weight))
              return multiply_in_f32<AlignedWeight>(gemm, codebook, stream);
            multiply_in_f32<AnyWeight>(gemm, codebook, stream);
          }};
}

template <class T, int n_tiles>
Gemm4bitRow<T> mma_row() {
  return {[](const Gemm4bit<T>& gemm) { return mma_segment(gemm) != 0; },
          [](const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
            if (mma_segment(gemm) == 64) return launch_gemm_4bit_mma<T, n_tiles, 64>(gemm, codebook, stream);
            launch_gemm_4bit_mma<T, n_tiles, 32>(gemm, codebook, stream);
          }};
}

template <class T>
Gemm4bitRow<T> wgmma_row() {
  return {fits_wgmma<T>, launch_gemm_4bit_wgmma<T>};
}

// Left to torch: nothing is launched.
template <class T>
Gemm4bitRow<T> dense_row() {
  return {[](const Gemm4bit<T>& gemm) { return gemm.weight.K >= kLeastTerms; }, nullptr};
}

template <class T>
Gemm4bitRow<T> row_of(Gemm4bitKernel kernel) {
  if (kernel == Gemm4bitKernel::f32) return f32_row<T>();
  if (kernel == Gemm4bitKernel::dense) return dense_row<T>();
  if constexpr (kMayHaveMma && !std::is_same_v<T, float>) {
    if (kernel == Gemm4bitKernel::mma8) return mma_row<T, 1>();
    if (kernel == Gemm4bitKernel::mma16) return mma_row<T, 2>();
    if (kernel == Gemm4bitKernel::mma32) return mma_row<T, 4>();
    if (kernel == Gemm4bitKernel::mma64) return mma_row<T, 8>();
    if (const auto row = staged_row<T>(kernel); row.takes) return row;
  }
  if constexpr (kBuiltForHopper && !std::is_same_v<T, float>) {
    if (kernel == Gemm4bitKernel::wgmma) return wgmma_row<T>();
  }
  return {[](const Gemm4bit<T>&) { return false; }, nullptr};
}

constexpr int64_t kNoKernel = -1;
std::atomic<int64_t> asked_kernel{kNoKernel};

template <class T>
Gemm4bitKernel kernel_for(const Gemm4bit<T>& gemm) {
  const auto takes = [&](Gemm4bitKernel kernel) { return row_of<T>(kernel).takes(gemm); };
  const int64_t asked = asked_kernel;
  if (asked != kNoKernel && takes(static_cast<Gemm4bitKernel>(asked)))
    return static_cast<Gemm4bitKernel>(asked);
  const WeightView& weight = gemm.weight;
  return choose_gemm_4bit(kGemm4bitChoices, kIsNvidia ? device_limits().compute_capability : kAnyChip, gemm.M,
                          weight.N * weight.K, takes);
}

template <class T>
Dense multiply(const Gemm4bit<T>& gemm, const Format4bit& format, Stream stream) {
  const Gemm4bitKernel kernel = kernel_for(gemm);
  if (kernel == Gemm4bitKernel::dense) return Dense::in_dtype;
  row_of<T>(kernel).launch(gemm, codebook_for<T>(format), stream);
  return Dense::nothing;
}

}  // namespace

namespace gpu {

Dense gemm_4bit(const Matrix& A, const Weight4bit& weight, const void* bias, void* out, Stream stream) {
  Dense left = Dense::nothing;
  with_gemm_4bit(A, weight, bias, out,
                 [&](const auto& gemm) { left = multiply(gemm, weight.format(), stream); });
  return left;
}

Dense gemm_4bit_backward(const Matrix& dY, const Weight4bit& weight, void*, Stream) {
  return dense_for(dY.dtype, weight.N);
}

int64_t gemm_4bit_kernel(const Matrix& A, const Weight4bit& weight) {
  int64_t chosen = kNoKernel;
  with_gemm_4bit(A, weight, nullptr, nullptr,
                 [&](const auto& gemm) { chosen = static_cast<int64_t>(kernel_for(gemm)); });
  return chosen;
}

int64_t set_gemm_4bit_kernel(int64_t kernel) {
  return asked_kernel.exchange(0 <= kernel && kernel < kGemm4bitKernels ? kernel : kNoKernel);
}

}  // namespace gpu
}  // namespace bnb
