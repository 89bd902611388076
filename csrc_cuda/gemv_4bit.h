// Products of few rows with a 4-bit weight by plain multiply-adds in f32: any type, any shape, any address.
//
// A warp multiplies neighbouring rows of the weight, its lanes side by side along K.
#pragma once

#include "gemm_4bit.h"

namespace bnb {

constexpr int kGemvThreads = 128;
constexpr int kGemvColumns = 2;  // rows of W, columns of the result, that a warp takes

// Up to kGemvColumns rows of W from n on with up to most_rows rows of X: store(row, n, sum) takes the
// products.
template <class Weights, int most_rows, class T, class Store>
__device__ inline void gemv_4bit_rows(const T* X, int rows, const WeightView& weight, LaneCodebook codebook,
                                      int64_t n, int columns, bool whole, const Store& store) {
  float sums[most_rows][kGemvColumns] = {};
#pragma unroll Weights::kUnroll
  for (int64_t k = lane() * kChunk; k < weight.K; k += kWarp * kChunk) {
    float w[kGemvColumns][kChunk];
#pragma unroll
    for (int c = 0; c < kGemvColumns; c++)
      Weights::decode(weight, codebook, c < columns ? n + c : n, k, w[c]);
#pragma unroll
    for (int r = 0; r < most_rows; r++) {
      if (r >= rows) continue;
      float x[kChunk];
      load_floats(X + r * weight.K + k, whole, weight.K - k, x);
#pragma unroll
      for (int i = 0; i < kChunk; i++) {
#pragma unroll
        for (int c = 0; c < kGemvColumns; c++) sums[r][c] = fmaf(x[i], w[c][i], sums[r][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < most_rows; r++) {
#pragma unroll
    for (int c = 0; c < kGemvColumns; c++) {
      const float sum = warp_sum(sums[r][c]);
      if (lane() == 0 && r < rows && c < columns) store(r, n + c, sum);
    }
  }
}

template <class Weights, int most_rows, class T, class Codebook>
__global__ void __launch_bounds__(kGemvThreads, 4) gemv_4bit_kernel(Gemm4bit<T> gemm, Codebook codes) {
  __shared__ float shared[kLaneCodebookSize];
  const LaneCodebook codebook = make_lane_codebook(codes, shared);
  __syncthreads();
  constexpr int kWarps = kGemvThreads / kWarp;
  const bool whole = has_whole_chunks(gemm);
  const int64_t warps = int64_t{gridDim.x} * kWarps;
  for (int64_t n = (int64_t{blockIdx.x} * kWarps + warp()) * kGemvColumns; n < gemm.weight.N;
       n += warps * kGemvColumns) {
    const int columns = static_cast<int>(min(gemm.weight.N - n, static_cast<int64_t>(kGemvColumns)));
    for (int64_t m = 0; m < gemm.M; m += most_rows) {
      const int rows = static_cast<int>(min(gemm.M - m, static_cast<int64_t>(most_rows)));
      gemv_4bit_rows<Weights, most_rows>(
          gemm.A + m * gemm.weight.K, rows, gemm.weight, codebook, n, columns, whole,
          [&](int r, int64_t column, float sum) { store_output(gemm, m + r, column, sum); });
    }
  }
}

template <class Weights, int most_rows, class T, class Codebook>
void launch_gemv_4bit(const Gemm4bit<T>& gemm, const Codebook& codes, Stream stream) {
  const int64_t blocks = ceil_div(gemm.weight.N, kGemvThreads / kWarp * kGemvColumns);
  launch("gemv_4bit", gemv_4bit_kernel<Weights, most_rows, T, Codebook>, blocks, kGemvThreads, stream, 0,
         gemm, codes);
}

}  // namespace bnb
