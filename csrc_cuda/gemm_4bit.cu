// Products with a 4-bit weight (docs/SPEC.md section 3): which kernel serves which, and what is left to
// torch.
#include <atomic>

#include "gemm_4bit_mma.h"
#include "gemm_4bit_tiles.h"
#include "gemm_4bit_wgmma.h"
#include "gemv_4bit.h"
#include "operations.h"

namespace bnb {
namespace {

template <class T, int segment>
void multiply_by_mma(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  if (gemm.M <= 8) return launch_gemm_4bit_mma<T, 1, segment>(gemm, codebook, stream);
  if (gemm.M <= 16) return launch_gemm_4bit_mma<T, 2, segment>(gemm, codebook, stream);
  if (gemm.M <= 32) return launch_gemm_4bit_mma<T, 4, segment>(gemm, codebook, stream);
  return launch_gemm_4bit_mma<T, 8, segment>(gemm, codebook, stream);
}

template <class Weights, class T>
void multiply_in_f32(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  if (gemm.M == 1) return launch_gemv_4bit<Weights, 1>(gemm, codebook, stream);
  if (gemm.M <= 8) return launch_gemv_4bit<Weights, 4>(gemm, codebook, stream);
  launch_gemm_4bit_tiles<Weights>(gemm, codebook, stream);
}

// Any product, fast where A has few rows. Kernels are asked in this order.
template <class T>
void multiply_fused(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  if constexpr (kMayHaveMma && !std::is_same_v<T, float>) {
    const int segment = mma_segment(gemm);
    if (segment == 64) return multiply_by_mma<T, 64>(gemm, codebook, stream);
    if (segment == 32) return multiply_by_mma<T, 32>(gemm, codebook, stream);
  }
  if (AlignedWeight::fits(gemm.weight)) return multiply_in_f32<AlignedWeight>(gemm, codebook, stream);
  multiply_in_f32<AnyWeight>(gemm, codebook, stream);
}

// Up to so many rows of A those kernels are the fastest; above, torch's matmul is, which reads the
// dequantized weight from the cache as often as it needs.
constexpr int64_t kFusedRows = 64;

// On an H200 the kernel on wgmma takes 0.6 to 0.8 of the time of dequantizing and multiplying at 96 and 128
// rows, 0.9 to 1.2 at 256, more above (benchmarks/results/gpu-2026-11-27-h200.md).
std::atomic<int64_t> most_wgmma_rows{128};

template <class T>
Dense multiply(const Gemm4bit<T>& gemm, const Format4bit& format, Stream stream) {
  const Codebook4bit codebook = codebook_for<T>(format);
  if (gemm.M <= kFusedRows || gemm.weight.K < kLeastTerms) {
    multiply_fused(gemm, codebook, stream);
    return Dense::nothing;
  }
  if constexpr (kBuiltForHopper && !std::is_same_v<T, float>) {
    if (gemm.M <= most_wgmma_rows && fits_wgmma(gemm)) {
      launch_gemm_4bit_wgmma(gemm, codebook, stream);
      return Dense::nothing;
    }
  }
  return Dense::in_dtype;
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

bool takes_wgmma(const Matrix& A, const Weight4bit& weight) {
  bool takes = false;
  with_gemm_4bit(A, weight, nullptr, nullptr, [&](const auto& gemm) { takes = fits_wgmma(gemm); });
  return takes;
}

int64_t set_wgmma_rows(int64_t rows) { return most_wgmma_rows.exchange(rows); }

}  // namespace gpu
}  // namespace bnb
