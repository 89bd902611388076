// The product behind the C symbols, whose callers have the values of the codes in the device's memory. Which
// codebook they are is not known here: reading them would wait for the device, which no capture of a graph
// allows.
#include "../csrc_shared/c_api.h"

#include "gemv_4bit.h"

namespace bnb {
namespace {

// gemv_4bit_kernel with the values of the codes from memory: it is made for one row of A.
template <class Weights, class T>
__global__ void __launch_bounds__(kGemvThreads, 4)
    gemv_4bit_of_code_kernel(Gemm4bit<T> gemm, const float* code) {
  __shared__ float shared[kLaneCodebookSize];
  for (int i = static_cast<int>(threadIdx.x); i < kLaneCodebookSize; i += kGemvThreads)
    shared[i] = code[i / kWarp];
  __syncthreads();
  const LaneCodebook codebook{shared + lane()};
  constexpr int kWarps = kGemvThreads / kWarp;
  const int64_t step = int64_t{gridDim.x} * kWarps * kGemvColumns;
  for (int64_t n = (int64_t{blockIdx.x} * kWarps + warp()) * kGemvColumns; n < gemm.weight.N; n += step) {
    for (int64_t m = 0; m < gemm.M; m++) gemv_4bit_rows<Weights, 1>(gemm, codebook, n, m);
  }
}

template <class Weights, class T>
void launch_gemv_4bit_of_code(const Gemm4bit<T>& gemm, const float* code, Stream stream) {
  const int64_t blocks = ceil_div(gemm.weight.N, kGemvThreads / kWarp * kGemvColumns);
  launch("gemv_4bit_of_code", gemv_4bit_of_code_kernel<Weights, T>, blocks, kGemvThreads, stream, 0, gemm,
         code);
}

}  // namespace

void gemm_4bit_of_code(DType dtype, int64_t M, int64_t N, int64_t K, const void* A, const uint8_t* packed,
                       const float* absmax, const float* code, int64_t blocksize, void* out, Stream stream) {
  const Weight4bit weight{packed, StoredScales(f32_scales(absmax)), N, K, log2_of(blocksize)};
  const bool aligned = K % kChunk == 0 && is_aligned(packed, sizeof(uint32_t));
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Gemm4bit<T> gemm{static_cast<const T*>(A), weight, nullptr, static_cast<T*>(out), M};
    if (aligned) return launch_gemv_4bit_of_code<AlignedWeight>(gemm, code, stream);
    launch_gemv_4bit_of_code<AnyWeight>(gemm, code, stream);
  });
}

}  // namespace bnb
