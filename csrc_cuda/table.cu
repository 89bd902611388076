// The one table of this kernel set.
#include "operations.h"

namespace bnb {

const Kernels& kernels() {
  static const Kernels table{
      gpu::quantize_blockwise,
      gpu::dequantize_blockwise,
      gpu::quantize_4bit,
      gpu::dequantize_4bit,
      gpu::gemm_4bit,
      gpu::gemm_4bit_backward,
      gpu::grouped_gemm_4bit,
      gpu::grouped_gemm_4bit_backward,
      gpu::int8_vectorwise_quant,
      gpu::int8_columnwise_quant,
      gpu::int8_vectorwise_dequant,
      gpu::int8_linear_matmul,
      gpu::int8_mm_dequant,
      gpu::int8_mixed_scaled_mm,
      gpu::int8_linear_backward,
      gpu::optimizer_update_32bit,
      gpu::optimizer_update_8bit_blockwise,
  };
  return table;
}

}  // namespace bnb
