// The one interface between Python and every compiled kernel set (CPU, CUDA, HIP, simulator).
//
// A kernel set fills one table of functions. Pointers are raw and contiguous, sizes are 64-bit, and every
// argument has been checked in Python before it arrives here. What each function computes, to the bit where
// bits are promised, is written in docs/SPEC.md.
//
// Functions are inlined always: sources compiled for different instruction sets must not share one.
#pragma once

#include <cstdint>

#include "formats.h"

namespace bnb {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

// A queue of the device the kernels run on; null on a CPU.
using Stream = void*;

// A tensor of any shape as a stack of rows, each as long as its last dimension.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, columns;

  BNB_ALWAYS_INLINE int64_t count() const { return rows * columns; }
  template <class T>
  BNB_ALWAYS_INLINE T* as() const {
    return static_cast<T*>(data);
  }
};

// The same of one integer type.
template <class T>
struct Rows {
  const T* data;
  int64_t rows, columns;

  BNB_ALWAYS_INLINE int64_t count() const { return rows * columns; }
};

// The scale of each block of a 4-bit weight: f32, or double-quantized when `nested_absmax` is set. Then
// absmax_b = nested_code[codes[b]] * nested_absmax[b / nested_blocksize] + *offset, two f32 roundings.
struct BlockScales {
  const float* absmax;         // f32[nb], null when double-quantized
  const uint8_t* codes;        // u8[nb], null otherwise
  const float* nested_absmax;  // f32[ceil(nb / nested_blocksize)]
  const float* nested_code;    // f32[256]
  const float* offset;         // f32[1]
  int64_t nested_blocksize;
  int64_t first_block;  // what codes[0] counts as where b / nested_blocksize is taken

  // Those from some block on.
  BNB_ALWAYS_INLINE BlockScales from(int64_t block) const {
    BlockScales result = *this;
    if (absmax) {
      result.absmax += block;
    } else {
      result.codes += block;
      result.first_block += block;
    }
    return result;
  }
};

BNB_ALWAYS_INLINE BlockScales f32_scales(const float* absmax) {
  return {absmax, nullptr, nullptr, nullptr, nullptr, 0, 0};
}

// A 4-bit weight [N, K] as the checkpoint stores it. Blocks run over the flat weight: element (n, k) lies in
// block (n * K + k) / blocksize, and its code in byte (n * K + k) / 2, the high nibble first.
struct Weight4bit {
  const uint8_t* packed;
  int64_t N, K;
  BlockScales scales;
  int64_t blocksize;  // a power of two
  QuantType quant_type;

  BNB_ALWAYS_INLINE int64_t count() const { return N * K; }
  BNB_ALWAYS_INLINE int64_t bytes() const { return (count() + 1) / 2; }
  BNB_ALWAYS_INLINE int64_t blocks() const { return (count() + blocksize - 1) >> block_shift(); }
  BNB_ALWAYS_INLINE int block_shift() const { return __builtin_ctzll(static_cast<uint64_t>(blocksize)); }
  BNB_ALWAYS_INLINE const Format4bit& format() const { return format_of(quant_type); }

  // Some of its rows, of which the first begins with a block.
  BNB_ALWAYS_INLINE Weight4bit rows(int64_t first, int64_t count) const {
    const int64_t element = first * K;
    return {packed + element / 2, count, K, scales.from(element >> block_shift()), blocksize, quant_type};
  }
};

// The rows of a matrix that are multiplied with each of several weights of one shape, stacked as [E * N, K]:
// weight e has rows offsets[e] to offsets[e + 1], which ascend from 0. No block of a weight reaches into the
// next.
struct Groups {
  const int32_t* offsets;  // i32[E + 1], in the device's memory
  int64_t count;           // E

  BNB_ALWAYS_INLINE int64_t begin(int64_t e) const { return offsets[e]; }
  BNB_ALWAYS_INLINE int64_t rows(int64_t e) const { return offsets[e + 1] - offsets[e]; }
};

// An int8 weight [N, K] with a scale for each row: W[n, k] = codes[n, k] * (scales[n] / 127).
struct Int8Weight {
  Rows<int8_t> codes;
  const float* scales;
};

// Weights may be rounded to f16 or bf16 for sums of so many terms: the errors of fewer do not even out.
constexpr int64_t kLeastTerms = 128;

// What of a product a kernel leaves to the dense matmul of torch, which is faster for it: nothing, or all of
// it, the weight dequantized to the input's dtype or to f32. Nothing has been written then.
enum class Dense : int32_t { nothing = 0, in_dtype = 1, in_f32 = 2 };

// What torch's matmul needs of a weight for sums of so many terms.
BNB_ALWAYS_INLINE Dense dense_for(DType dtype, int64_t terms) {
  return dtype == DType::f32 || terms >= kLeastTerms ? Dense::in_dtype : Dense::in_f32;
}

// The integer products of A [M, K] and B [N, K], and what makes floats of them.
struct Int8Product {
  Rows<int8_t> A, B;
  const int32_t* products;  // A @ B^T i32[M, N] where they have been taken already, else null
  const float* row_stats;   // f32[M]
  const float* col_stats;   // f32[N]
};

// A before it was quantized, and which of its columns u8[K] are multiplied as they are; null for none.
struct Int8Outliers {
  const void* unquantized;
  const uint8_t* columns;
};

enum class OptimizerName : int32_t {
  adam = 0,
  lamb,
  ademamix,
  momentum,
  lars,
  lion,
  rmsprop,
  adagrad,
};
// In that order; Python knows optimizers by these names.
constexpr const char* kOptimizerNames[] = {"adam", "lamb", "ademamix", "momentum",
                                           "lars", "lion", "rmsprop",  "adagrad"};

// The hyperparameters of one optimizer step (docs/SPEC.md section 5). They stay f64 until they are combined:
// 1 - beta2 of an f32 beta2 would be off by 5e-5.
struct OptimizerStep {
  OptimizerName name;
  int64_t step;  // from 1
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm;
  bool skip_zeros;
  double t_alpha, t_beta3;      // over so many steps alpha and beta3 rise; 0: they do not
  double log_beta1, log_beta3;  // where beta3 rises; 0 of a beta of 0
  const double* lr_in_memory;   // that of the device; null: lr counts
};

// A parameter of a step: its gradient and state, all of n elements, which are updated but for g. State that
// an optimizer does not use is null. The first of ademamix stacks two moments: f32[2, n].
struct Parameter32bit {
  const void* g;
  void* p;
  int64_t n;
  float *state1, *state2;
};
// The same with 8-bit state in blocks of 256: u8[n] codes and f32[nb] absmax ([2, n] and [2, nb]).
struct Parameter8bit {
  const void* g;
  void* p;
  int64_t n;
  uint8_t *state1, *state2;
  float *absmax1, *absmax2;
};
// The codebooks f32[256] of the two states.
struct StateCodebooks {
  const float *state1, *state2;
};

// Parameters that share a step, a dtype, and the codebooks of their states.
template <class Parameter>
struct Parameters {
  const Parameter* first;
  int64_t count;
  DType dtype;                  // of g and p
  const double* const* counts;  // each one's step, in the device's memory; null: that of the OptimizerStep

  BNB_ALWAYS_INLINE const double* count_of(int64_t i) const { return counts ? counts[i] : nullptr; }
};

struct Kernels {
  // q u8[n], absmax f32[ceil(n / blocksize)]; code f32[256] ascending.
  void (*quantize_blockwise)(const Matrix& A, const float* code, int64_t blocksize, uint8_t* q, float* absmax,
                             Stream stream);
  void (*dequantize_blockwise)(const uint8_t* q, const float* absmax, const float* code, int64_t blocksize,
                               const Matrix& out, Stream stream);

  // packed u8[bytes], bytes >= ceil(n / 2): elements past n hold the code of 0.0.
  void (*quantize_4bit)(const Matrix& A, int64_t blocksize, QuantType quant_type, uint8_t* packed,
                        float* absmax, Stream stream);
  // `out` has the weight's elements in any shape.
  void (*dequantize_4bit)(const Weight4bit& weight, const Matrix& out, Stream stream);

  // out[M, N] = A[M, K] @ weight^T + bias[N], all in A's dtype; bias may be null.
  Dense (*gemm_4bit)(const Matrix& A, const Weight4bit& weight, const void* bias, void* out, Stream stream);
  // Its gradient: dA[M, K] = dY[M, N] @ weight, in dY's dtype.
  Dense (*gemm_4bit_backward)(const Matrix& dY, const Weight4bit& weight, void* dA, Stream stream);

  // The same for each of several weights: out[m] = A[m] @ weights[e]^T + bias[e] for the rows m of e, and
  // dA[m] = dY[m] @ weights[e]. False, and nothing is written, where the offsets can be looked at and are
  // none.
  bool (*grouped_gemm_4bit)(const Matrix& A, const Weight4bit& weights, const Groups& groups,
                            const void* bias, void* out, Stream stream);
  bool (*grouped_gemm_4bit_backward)(const Matrix& dY, const Weight4bit& weights, const Groups& groups,
                                     void* dA, Stream stream);

  // q i8[M, K], row_stats f32[M]; outlier_columns u8[K] (1: outlier) is not touched when threshold is 0.
  void (*int8_vectorwise_quant)(const Matrix& A, float threshold, int8_t* q, float* row_stats,
                                uint8_t* outlier_columns, Stream stream);
  // The same down the columns: col_stats f32[K]; outlier_columns is read, but not when threshold is 0.
  void (*int8_columnwise_quant)(const Matrix& A, float threshold, int8_t* q, float* col_stats,
                                const uint8_t* outlier_columns, Stream stream);
  // out[M, K] = codes * scales[row] / 127 in f32, rounded once to out's dtype
  void (*int8_vectorwise_dequant)(const Int8Weight& weight, const Matrix& out, Stream stream);
  // C i32[M, N] = A i8[M, K] @ B i8[N, K]^T
  void (*int8_linear_matmul)(const Rows<int8_t>& A, const Rows<int8_t>& B, int32_t* C, Stream stream);
  // out[M, N] = C * (row_stats / 16129) * col_stats + bias, each operation rounded to f32, then to out's
  // dtype once; bias has that dtype and may be null.
  void (*int8_mm_dequant)(const int32_t* C, const float* row_stats, const float* col_stats, const void* bias,
                          const Matrix& out, Stream stream);
  // int8_linear_matmul and int8_mm_dequant in one, plus the sum over outlier columns k of
  // unquantized[m, k] * (B[n, k] * col_stats[n] / 127), unquantized having out's dtype. Products that have
  // been taken already may be taken anew.
  void (*int8_mixed_scaled_mm)(const Int8Product& product, const Int8Outliers& outliers, const void* bias,
                               const Matrix& out, Stream stream);
  // The gradient of A in a linear layer with an int8 weight: dA[M, K] = dY[M, N] @ weight, in dY's dtype.
  Dense (*int8_linear_backward)(const Matrix& dY, const Int8Weight& weight, void* dA, Stream stream);

  // norms f64[2] receives |p|^2 before the step and |update|^2, both over finite entries, and is null when
  // max_unorm is 0; otherwise there is one parameter.
  void (*optimizer_update_32bit)(const OptimizerStep& step, const Parameters<Parameter32bit>& parameters,
                                 double* norms, Stream stream);
  void (*optimizer_update_8bit_blockwise)(const OptimizerStep& step,
                                          const Parameters<Parameter8bit>& parameters,
                                          const StateCodebooks& codebooks, double* norms, Stream stream);
};

// The table that serves from now on.
const Kernels& kernels();

}  // namespace bnb
