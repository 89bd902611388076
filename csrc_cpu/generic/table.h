// What a target exports.
#pragma once

#include "../targets/targets.h"
#include "grouped.h"
#include "optimizer.h"

namespace bnb::BNB_TARGET {
namespace {

// Dot takes the products of int8 values, and Own are the kernels that only this instruction set has.
template <class Dot, class Own>
constexpr Target target() {
  return {{
              quantize_blockwise<typename Own::Encoding>,
              dequantize_blockwise,
              quantize_4bit<typename Own::FormatEncoding>,
              dequantize_4bit,
              gemm_4bit<typename Own::Gemm4bit>,
              gemm_4bit_backward<typename Own::Backward4bit>,
              grouped_gemm_4bit<typename Own::Gemm4bit>,
              grouped_gemm_4bit_backward<typename Own::Backward4bit>,
              int8_vectorwise_quant,
              int8_columnwise_quant,
              int8_vectorwise_dequant,
              int8_linear_matmul<Dot, typename Own::Int8>,
              int8_mm_dequant,
              int8_mixed_scaled_mm<Dot, typename Own::Int8>,
              int8_linear_backward,
              optimizer_update_32bit,
              optimizer_update_8bit_blockwise<typename Own::Encoding>,
          },
          gemm_4bit_of_code};
}

}  // namespace
}  // namespace bnb::BNB_TARGET
