// The product behind the C symbols, whose callers have the values of the codes in the device's memory. Which
// codebook they are is not known here: reading them would wait for the device, which no capture of a graph
// allows.
#include "../csrc_shared/c_api.h"

#include "gemm_4bit_mma.h"
#include "gemv_4bit.h"

namespace bnb {
namespace {

// The kernels are those made for one row of A; more are right, too.
template <class T>
void multiply(const Gemm4bit<T>& gemm, const float* code, Stream stream) {
  const StoredCodebook4bit codebook = stored_codebook_for<T>(code);
  if constexpr (kMayHaveMma && !std::is_same_v<T, float>) {
    const int segment = mma_segment(gemm);
    if (segment == 64) return launch_gemm_4bit_mma<T, 1, 64>(gemm, codebook, stream);
    if (segment == 32) return launch_gemm_4bit_mma<T, 1, 32>(gemm, codebook, stream);
  }
  if (AlignedWeight::fits(gemm.weight)) return launch_gemv_4bit<AlignedWeight, 1>(gemm, codebook, stream);
  launch_gemv_4bit<AnyWeight, 1>(gemm, codebook, stream);
}

}  // namespace

void gemm_4bit_of_code(const Matrix& A, const Weight4bit& weight, const float* code, void* out,
                       Stream stream) {
  with_gemm_4bit(A, weight, nullptr, out, [&](const auto& gemm) { multiply(gemm, code, stream); });
}

}  // namespace bnb
