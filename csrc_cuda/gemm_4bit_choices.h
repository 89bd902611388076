// Which kernel serves which product with a 4-bit weight: {chip, rows of A up to, weights up to, kernel}, as
// gemm_4bit_kernels.h reads them. `benchmarks/gpu.sh --sweep FILE` writes this file anew for the card that it
// runs on, and leaves the rows of other chips as they are.
#pragma once

#include "gemm_4bit_kernels.h"

namespace bnb {

// clang-format off
constexpr Gemm4bitChoice kGemm4bitChoices[] = {
    // Measured on an H200, 2026-11-27, without the staged kernels, which are newer: wgmma takes 0.6 to 0.8 of the
    // time of dequantizing and multiplying at 96 and 128 rows, 0.9 to 1.2 at 256, more above.
    {90, 8, kAnyNumber, Gemm4bitKernel::mma8},
    {90, 16, kAnyNumber, Gemm4bitKernel::mma16},
    {90, 32, kAnyNumber, Gemm4bitKernel::mma32},
    {90, 64, kAnyNumber, Gemm4bitKernel::mma64},
    {90, 128, kAnyNumber, Gemm4bitKernel::wgmma},
    // Not measured.
    {kAnyChip, 8, kAnyNumber, Gemm4bitKernel::mma8},
    {kAnyChip, 16, kAnyNumber, Gemm4bitKernel::mma16},
    {kAnyChip, 32, kAnyNumber, Gemm4bitKernel::mma32},
    {kAnyChip, 64, kAnyNumber, Gemm4bitKernel::mma64},
    {kAnyChip, 64, kAnyNumber, Gemm4bitKernel::f32},
    {kAnyChip, kAnyNumber, kAnyNumber, Gemm4bitKernel::dense},
};
// clang-format on

}  // namespace bnb
