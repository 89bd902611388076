// Plain C symbols over the table of kernels, for callers that have pointers and no tensors. Names and
// argument order are those that programs written for bitsandbytes look up in its library. Nothing is checked
// here, and a kernel that throws ends the process: a C caller has no way to catch it.
#include "c_api.h"

#include "kernels.h"

#define BNB_EXPORT extern "C" __attribute__((visibility("default")))

// out[n] from the codes A u8[n] and absmax f32[ceil(n / blocksize)], with code f32[256]; for nf4 and fp4 from
// packed codes, and code is not read. For products it is f32[16]; out_features x in_features is W's shape,
// rows that of A and out, and the leading dimensions are ignored: everything is contiguous.
#define BNB_C_API(suffix, dtype)                                                                             \
  BNB_EXPORT void cdequantize_blockwise_##suffix(const float* code, const uint8_t* A, const float* absmax,   \
                                                 void* out, int blocksize, int n, void* stream) noexcept {   \
    bnb::kernels().dequantize_blockwise(A, absmax, code, n, blocksize, out, dtype, stream);                  \
  }                                                                                                          \
  BNB_EXPORT void cdequantize_blockwise_##suffix##_nf4(const float*, const uint8_t* A, const float* absmax,  \
                                                       void* out, int blocksize, int n,                      \
                                                       void* stream) noexcept {                              \
    bnb::kernels().dequantize_4bit(A, bnb::f32_scales(absmax), n, blocksize, bnb::QuantType::nf4, out,       \
                                   dtype, stream);                                                           \
  }                                                                                                          \
  BNB_EXPORT void cdequantize_blockwise_##suffix##_fp4(const float*, const uint8_t* A, const float* absmax,  \
                                                       void* out, int blocksize, int n,                      \
                                                       void* stream) noexcept {                              \
    bnb::kernels().dequantize_4bit(A, bnb::f32_scales(absmax), n, blocksize, bnb::QuantType::fp4, out,       \
                                   dtype, stream);                                                           \
  }                                                                                                          \
  BNB_EXPORT void cgemm_4bit_inference_naive_##suffix(int out_features, int rows, int in_features,           \
                                                      const void* A, const uint8_t* packed,                  \
                                                      const float* absmax, const float* code, void* out,     \
                                                      int, int, int, int blocksize, void* stream) noexcept { \
    bnb::gemm_4bit_of_code(dtype, rows, out_features, in_features, A, packed, absmax, code, blocksize, out,  \
                           stream);                                                                          \
  }

BNB_C_API(fp32, bnb::DType::f32)
BNB_C_API(fp16, bnb::DType::f16)
BNB_C_API(bf16, bnb::DType::bf16)
