// Plain C symbols over the table of kernels, for callers that have pointers and no tensors. Names and
// argument order are those that programs written for bitsandbytes look up in its library. Nothing is checked
// here, and a kernel that throws ends the process: a C caller has no way to catch it.
#include "c_api.h"

#include "kernels.h"

#define BNB_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The caller of a product does not name the format.
bnb::Weight4bit weight_4bit(const uint8_t* packed, int64_t N, int64_t K, const float* absmax, int blocksize,
                            bnb::QuantType quant_type = {}) {
  return {packed, N, K, bnb::f32_scales(absmax), blocksize, quant_type};
}

// Of what a kernel reads or writes; a kernel that only reads changes nothing.
bnb::Matrix matrix(const void* data, bnb::DType dtype, int64_t rows, int64_t columns) {
  return {const_cast<void*>(data), dtype, rows, columns};
}

}  // namespace

// out[n] from the packed codes A and absmax; the format says what they stand for.
#define BNB_C_API_4BIT(suffix, dtype, format)                                                              \
  BNB_EXPORT void cdequantize_blockwise_##suffix##_##format(const float*, const uint8_t* A,                \
                                                            const float* absmax, void* out, int blocksize, \
                                                            int n, void* stream) noexcept {                \
    bnb::kernels().dequantize_4bit(weight_4bit(A, 1, n, absmax, blocksize, bnb::QuantType::format),        \
                                   matrix(out, dtype, 1, n), stream);                                      \
  }

// out[n] from the codes A u8[n] and absmax f32[ceil(n / blocksize)], with code f32[256]. For products it is
// f32[16]; out_features x in_features is W's shape, rows that of A and out, and the leading dimensions are
// ignored: everything is contiguous.
#define BNB_C_API(suffix, dtype)                                                                             \
  BNB_EXPORT void cdequantize_blockwise_##suffix(const float* code, const uint8_t* A, const float* absmax,   \
                                                 void* out, int blocksize, int n, void* stream) noexcept {   \
    bnb::kernels().dequantize_blockwise(A, absmax, code, blocksize, matrix(out, dtype, 1, n), stream);       \
  }                                                                                                          \
  BNB_C_API_4BIT(suffix, dtype, nf4)                                                                         \
  BNB_C_API_4BIT(suffix, dtype, fp4)                                                                         \
  BNB_EXPORT void cgemm_4bit_inference_naive_##suffix(int out_features, int rows, int in_features,           \
                                                      const void* A, const uint8_t* packed,                  \
                                                      const float* absmax, const float* code, void* out,     \
                                                      int, int, int, int blocksize, void* stream) noexcept { \
    bnb::gemm_4bit_of_code(matrix(A, dtype, rows, in_features),                                              \
                           weight_4bit(packed, out_features, in_features, absmax, blocksize), code, out,     \
                           stream);                                                                          \
  }

BNB_C_API(fp32, bnb::DType::f32)
BNB_C_API(fp16, bnb::DType::f16)
BNB_C_API(bf16, bnb::DType::bf16)
