// A product with a 4-bit weight, as its kernels take it.
#pragma once

#include "gemm_4bit_kernels.h"
#include "weight_4bit.h"

namespace bnb {

// out[M, N] = A[M, K] @ W[N, K]^T + bias[N]; bias may be null.
template <class T>
struct Gemm4bit {
  using Element = T;
  const T* A;
  WeightView weight;
  const T* bias;
  T* out;
  int64_t M;
};

// Calls f with the product for kernels of A's dtype, unless it has no elements.
template <class F>
void with_gemm_4bit(const Matrix& A, const Weight4bit& weight, const void* bias, void* out, const F& f) {
  if (A.rows == 0 || weight.N == 0) return;
  with_dtype(A.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    f(Gemm4bit<T>{A.as<const T>(), WeightView(weight), static_cast<const T*>(bias), static_cast<T*>(out),
                  A.rows});
  });
}

// A kernel of gemm_4bit_kernels.h, for A of one dtype: which products it takes on the current device, and its
// launch.
template <class T>
struct Gemm4bitRow {
  bool (*takes)(const Gemm4bit<T>& gemm);
  void (*launch)(const Gemm4bit<T>& gemm, const Codebook4bit& codebook, Stream stream);
};

// Of those in gemm_4bit_staged.cu; a row of null pointers for any other kernel.
template <class T>
Gemm4bitRow<T> staged_row(Gemm4bitKernel kernel);

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
