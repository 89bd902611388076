// The table that a target exports.
#pragma once

#include "../targets/targets.h"
#include "gemm_4bit_backward.h"
#include "int8.h"
#include "optimizer.h"
#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr Kernels kTable = {
    quantize_blockwise,
    dequantize_blockwise,
    quantize_4bit,
    dequantize_4bit,
    gemm_4bit,
    int8_vectorwise_quant,
    int8_columnwise_quant,
    int8_vectorwise_dequant,
    int8_linear_matmul<PairsDot>,
    int8_mm_dequant,
    int8_mixed_scaled_mm<PairsDot>,
    optimizer_update_32bit,
    optimizer_update_8bit_blockwise,
};

}  // namespace
}  // namespace bnb::BNB_TARGET
