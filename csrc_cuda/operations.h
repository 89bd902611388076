// The functions of kernels.h as this kernel set defines them, each in the file of its operation.
#pragma once

#include <type_traits>

#include "../csrc_shared/kernels.h"

namespace bnb::gpu {

template <class Pointer>
using Function = std::remove_pointer_t<Pointer>;

// quantize.cu
extern Function<decltype(Kernels::quantize_blockwise)> quantize_blockwise;
extern Function<decltype(Kernels::dequantize_blockwise)> dequantize_blockwise;
extern Function<decltype(Kernels::quantize_4bit)> quantize_4bit;
extern Function<decltype(Kernels::dequantize_4bit)> dequantize_4bit;

// gemm_4bit.cu
extern Function<decltype(Kernels::gemm_4bit)> gemm_4bit;
extern Function<decltype(Kernels::gemm_4bit_backward)> gemm_4bit_backward;
// Which kernel of gemm_4bit_kernels.h serves products of A with such a weight on the current device, as its
// number there; -1 for a product without elements.
int64_t gemm_4bit_kernel(const Matrix& A, const Weight4bit& weight);
// The kernel with this number serves from now on, wherever it takes the product; -1: as the table says. Gives
// the number before.
int64_t set_gemm_4bit_kernel(int64_t kernel);

// grouped_gemm_4bit.cu
extern Function<decltype(Kernels::grouped_gemm_4bit)> grouped_gemm_4bit;
extern Function<decltype(Kernels::grouped_gemm_4bit_backward)> grouped_gemm_4bit_backward;

// int8_quantize.cu
extern Function<decltype(Kernels::int8_vectorwise_quant)> int8_vectorwise_quant;
extern Function<decltype(Kernels::int8_columnwise_quant)> int8_columnwise_quant;
extern Function<decltype(Kernels::int8_vectorwise_dequant)> int8_vectorwise_dequant;

// int8_matmul.cu
extern Function<decltype(Kernels::int8_linear_matmul)> int8_linear_matmul;
extern Function<decltype(Kernels::int8_mm_dequant)> int8_mm_dequant;
extern Function<decltype(Kernels::int8_mixed_scaled_mm)> int8_mixed_scaled_mm;
extern Function<decltype(Kernels::int8_linear_backward)> int8_linear_backward;

// optimizer.cu
extern Function<decltype(Kernels::optimizer_update_32bit)> optimizer_update_32bit;
extern Function<decltype(Kernels::optimizer_update_8bit_blockwise)> optimizer_update_8bit_blockwise;

}  // namespace bnb::gpu
