// What a target exports.
#pragma once

#include "../targets/targets.h"
#include "choice.h"
#include "optimizer.h"

namespace bnb::BNB_TARGET {
namespace {

// Dot takes the products of int8 values, and Tiles are the kernels on matrix tiles.
template <class Dot, class Tiles>
constexpr Target target() {
  return {{
              quantize_blockwise,
              dequantize_blockwise,
              quantize_4bit,
              dequantize_4bit,
              gemm_4bit<typename Tiles::Gemm4bit>,
              gemm_4bit_backward<typename Tiles::Backward4bit>,
              int8_vectorwise_quant,
              int8_columnwise_quant,
              int8_vectorwise_dequant,
              int8_linear_matmul<Dot, typename Tiles::Int8>,
              int8_mm_dequant,
              int8_mixed_scaled_mm<Dot, typename Tiles::Int8>,
              int8_linear_backward,
              optimizer_update_32bit,
              optimizer_update_8bit_blockwise,
          },
          gemm_4bit_of_code};
}

}  // namespace
}  // namespace bnb::BNB_TARGET
