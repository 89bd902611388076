// Matmul with a 4-bit weight (docs/SPEC.md section 3): which kernel serves which product.
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

constexpr int64_t kFewRows = 64;  // up to so many of A read the weight faster in gemm_4bit_mma.h

template <class Weights, class T>
void multiply_in_f32(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  if (gemm.M == 1) return launch_gemv_4bit<Weights, 1>(gemm, codebook, stream);
  if (gemm.M <= 8) return launch_gemv_4bit<Weights, 4>(gemm, codebook, stream);
  launch_gemm_4bit_tiles<Weights>(gemm, codebook, stream);
}

// Kernels are asked in this order.
template <class T>
void multiply(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream) {
  if constexpr (kBuiltForHopper && !std::is_same_v<T, float>) {
    const Weight4bit& weight = gemm.weight;
    if (gemm.M > kFewRows && fits_wgmma(gemm.A, weight.K, weight.packed, int64_t{1} << weight.blocksize_log2))
      return launch_gemm_4bit_wgmma<T>(gemm, codebook, stream);
  }
  if constexpr (kMayHaveMma && !std::is_same_v<T, float>) {
    const int segment = mma_segment(gemm);
    if (segment == 64) return multiply_by_mma<T, 64>(gemm, codebook, stream);
    if (segment == 32) return multiply_by_mma<T, 32>(gemm, codebook, stream);
  }
  if (gemm.weight.K % kChunk == 0 && is_aligned(gemm.weight.packed, sizeof(uint32_t)))
    return multiply_in_f32<AlignedWeight>(gemm, codebook, stream);
  multiply_in_f32<AnyWeight>(gemm, codebook, stream);
}

}  // namespace

namespace gpu {

void gemm_4bit(const void* A, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
               const BlockScales& scales, int64_t blocksize, QuantType quant_type, const void* bias,
               void* out, Stream stream) {
  if (M == 0 || N == 0) return;
  const Weight4bit weight{packed, StoredScales(scales), N, K, log2_of(blocksize)};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Gemm4bit<T> gemm{static_cast<const T*>(A), weight, static_cast<const T*>(bias),
                           static_cast<T*>(out), M};
    multiply(gemm, codebook_4bit(quant_type), stream);
  });
}

bool takes_wgmma(const void* A, DType dtype, int64_t K, const uint8_t* packed, int64_t blocksize) {
  return dtype != DType::f32 && fits_wgmma(A, K, packed, blocksize);
}

}  // namespace gpu
}  // namespace bnb
