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
void multiply(const Gemm4bit<T>& gemm, const StoredCodebook4bit& codebook, Stream stream) {
  if constexpr (kMayHaveMma && !std::is_same_v<T, float>) {
    const int segment = mma_segment(gemm);
    if (segment == 64) return launch_gemm_4bit_mma<T, 1, 64>(gemm, codebook, stream);
    if (segment == 32) return launch_gemm_4bit_mma<T, 1, 32>(gemm, codebook, stream);
  }
  if (gemm.weight.K % kChunk == 0 && is_aligned(gemm.weight.packed, sizeof(uint32_t)))
    return launch_gemv_4bit<AlignedWeight, 1>(gemm, codebook, stream);
  launch_gemv_4bit<AnyWeight, 1>(gemm, codebook, stream);
}

}  // namespace

void gemm_4bit_of_code(DType dtype, int64_t M, int64_t N, int64_t K, const void* A, const uint8_t* packed,
                       const float* absmax, const float* code, int64_t blocksize, void* out, Stream stream) {
  if (M == 0 || N == 0) return;
  const Weight4bit weight{packed, StoredScales(f32_scales(absmax)), N, K, log2_of(blocksize)};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Gemm4bit<T> gemm{static_cast<const T*>(A), weight, nullptr, static_cast<T*>(out), M};
    multiply(gemm, StoredCodebook4bit{code}, stream);
  });
}

}  // namespace bnb
