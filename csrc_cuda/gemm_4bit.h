// A product with a 4-bit weight, as its kernels take it.
#pragma once

#include "weight_4bit.h"

namespace bnb {

// out[M, N] = A[M, K] @ W[N, K]^T + bias[N]; bias may be null.
template <class T>
struct Gemm4bit {
  const T* A;
  Weight4bit weight;
  const T* bias;
  T* out;
  int64_t M;
};

constexpr int64_t kMostMmaColumns = int64_t{1} << 30;  // on tensor cores columns are counted in 32 bits

template <class T>
__device__ inline void store_output(const Gemm4bit<T>& gemm, int64_t m, int64_t n, float value) {
  if (gemm.bias) value += to_float(gemm.bias[n]);
  gemm.out[m * gemm.weight.N + n] = from_float<T>(value);
}

// Whether every chunk of every row of A can be loaded in whole accesses.
template <class T>
__device__ inline bool has_whole_chunks(const Gemm4bit<T>& gemm) {
  return gemm.weight.K % kChunk == 0 && are_aligned<kChunk>(gemm.A);
}

}  // namespace bnb
