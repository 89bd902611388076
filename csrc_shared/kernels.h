// The one interface between Python and every compiled kernel set (CPU, CUDA, HIP, simulator).
//
// A kernel set fills one table of functions. Pointers are raw and contiguous, sizes are 64-bit, and every
// argument has been checked in Python before it arrives here. What each function computes, to the bit where
// bits are promised, is written in docs/SPEC.md.
#pragma once

#include <cstdint>

namespace bnb {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };
enum class QuantType : int32_t { fp4 = 0, nf4 = 1 };
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

// A queue of the device the kernels run on; null on a CPU.
using Stream = void*;

// The scale of each block of a 4-bit weight: f32, or double-quantized when `nested_absmax` is set. Then
// absmax_b = nested_code[codes[b]] * nested_absmax[b / nested_blocksize] + *offset, two f32 roundings.
struct BlockScales {
  const float* absmax;         // f32[nb], null when double-quantized
  const uint8_t* codes;        // u8[nb], null otherwise
  const float* nested_absmax;  // f32[ceil(nb / nested_blocksize)]
  const float* nested_code;    // f32[256]
  const float* offset;         // f32[1]
  int64_t nested_blocksize;
};

inline BlockScales f32_scales(const float* absmax) { return {absmax, nullptr, nullptr, nullptr, nullptr, 0}; }

// Weights may be rounded to f16 or bf16 for sums of so many terms: the errors of fewer do not even out.
constexpr int64_t kLeastTerms = 128;

// The hyperparameters of one optimizer step, schedules already applied (docs/SPEC.md section 5). They stay
// f64 until they are combined: 1 - beta2 of an f32 beta2 would be off by 5e-5.
struct OptimizerStep {
  OptimizerName name;
  int64_t step;  // from 1
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm;
  bool skip_zeros;
};

struct Kernels {
  // q u8[n], absmax f32[ceil(n / blocksize)]; code f32[256] ascending.
  void (*quantize_blockwise)(const void* A, DType dtype, int64_t n, const float* code, int64_t blocksize,
                             uint8_t* q, float* absmax, Stream stream);
  void (*dequantize_blockwise)(const uint8_t* q, const float* absmax, const float* code, int64_t n,
                               int64_t blocksize, void* out, DType dtype, Stream stream);

  // packed u8[bytes], bytes >= ceil(n / 2): elements past n hold the code of 0.0.
  void (*quantize_4bit)(const void* A, DType dtype, int64_t n, int64_t blocksize, QuantType quant_type,
                        uint8_t* packed, float* absmax, Stream stream);
  void (*dequantize_4bit)(const uint8_t* packed, const BlockScales& scales, int64_t n, int64_t blocksize,
                          QuantType quant_type, void* out, DType dtype, Stream stream);

  // out[M, N] = A[M, K] @ dequantized(packed)[N, K]^T + bias[N]; A, bias and out share `dtype`; bias may be
  // null. Blocks run over the flat weight: element (n, k) lies in block (n * K + k) / blocksize.
  void (*gemm_4bit)(const void* A, DType dtype, int64_t M, int64_t N, int64_t K, const uint8_t* packed,
                    const BlockScales& scales, int64_t blocksize, QuantType quant_type, const void* bias,
                    void* out, Stream stream);

  // q i8[M, K], row_stats f32[M]; outlier_columns u8[K] (1: outlier), null when threshold is 0.
  void (*int8_vectorwise_quant)(const void* A, DType dtype, int64_t M, int64_t K, float threshold, int8_t* q,
                                float* row_stats, uint8_t* outlier_columns, Stream stream);
  // The same down the columns: col_stats f32[K]; outlier_columns is read (null: none).
  void (*int8_columnwise_quant)(const void* A, DType dtype, int64_t M, int64_t K, float threshold, int8_t* q,
                                float* col_stats, const uint8_t* outlier_columns, Stream stream);
  // out f32[M, K] = q * stats[row] / 127
  void (*int8_vectorwise_dequant)(const int8_t* q, const float* stats, int64_t M, int64_t K, float* out,
                                  Stream stream);
  // C i32[M, N] = A i8[M, K] @ B i8[N, K]^T
  void (*int8_linear_matmul)(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K, int32_t* C,
                             Stream stream);
  // out[M, N] = C * (row_stats / 16129) * col_stats + bias, each operation rounded to f32, then to dtype
  // once.
  void (*int8_mm_dequant)(const int32_t* C, const float* row_stats, const float* col_stats, int64_t M,
                          int64_t N, const void* bias, void* out, DType dtype, Stream stream);
  // int8_linear_matmul and int8_mm_dequant in one, plus, where outlier_columns u8[K] is given,
  // sum over its columns k of X[m, k] * (B[n, k] * col_stats[n] / 127), X being A before quantization. C
  // i32[M, N] are the products where they have been taken already, else null; a kernel set may take them
  // anew.
  void (*int8_mixed_scaled_mm)(const int8_t* A, const int8_t* B, int64_t M, int64_t N, int64_t K,
                               const int32_t* C, const float* row_stats, const float* col_stats,
                               const void* X, const uint8_t* outlier_columns, const void* bias, void* out,
                               DType dtype, Stream stream);

  // g and p share `dtype`; state1 (f32[2, n] for ademamix) and state2 (null where unused) are f32[n].
  // norms f64[2] receives |p|^2 before the step and |update|^2, both over finite entries; null when max_unorm
  // is 0.
  void (*optimizer_update_32bit)(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                 float* state1, float* state2, int64_t n, double* norms, Stream stream);
  // 8-bit state in blocks of 256: u8[n] codes with f32[nb] absmax ([2, n] and [2, nb] for ademamix's state1).
  void (*optimizer_update_8bit_blockwise)(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                          uint8_t* state1, uint8_t* state2, const float* qmap1,
                                          const float* qmap2, float* absmax1, float* absmax2, int64_t n,
                                          double* norms, Stream stream);
};

// The table that serves from now on.
const Kernels& kernels();

}  // namespace bnb
