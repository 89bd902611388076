// The two 4-bit codebooks, and the thresholds that quantization compares against (docs/SPEC.md section 1).
#pragma once

#include "host_device.h"

namespace bnb {

// NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E), ascending.
constexpr float kNf4Code[16] = {
    -0x1.000000p+0f, -0x1.647362p-1f, -0x1.0cd660p-1f, -0x1.946540p-2f, -0x1.23449ap-2f, -0x1.7a6a7ep-3f,
    -0x1.74f0e2p-4f, 0x0.000000p+0f,  0x1.45f5fep-4f,  0x1.4995c6p-3f,  0x1.f809bap-3f,  0x1.5a0674p-2f,
    0x1.c34970p-2f,  0x1.200f56p-1f,  0x1.722766p-1f,  0x1.000000p+0f,
};
constexpr int kNf4Zero = 7;

// FP4: the sign in bit 3, a magnitude in the low three bits that is not in ascending order.
constexpr float kFp4Code[16] = {
    0.0f, 1.0f / 192,  2.0f / 3,  1.0f,  1.0f / 3,  0.5f,  1.0f / 6,  0.25f,
    0.0f, -1.0f / 192, -2.0f / 3, -1.0f, -1.0f / 3, -0.5f, -1.0f / 6, -0.25f,
};
constexpr int kFp4Zero = 0;

constexpr float kFp4AscendingMagnitudes[8] = {0.0f,     1.0f / 192, 1.0f / 6, 0.25f,
                                              1.0f / 3, 0.5f,       2.0f / 3, 1.0f};

// The low three bits of the FP4 code of the r-th smallest magnitude: 0, 1, 6, 7, 4, 5, 2, 3.
BNB_HOST_DEVICE constexpr int fp4_code_of_rank(int r) { return r ^ ((r & 2) << 1); }

// The threshold between entries j and j + 1 of an ascending codebook; a value equal to it takes entry j.
BNB_HOST_DEVICE constexpr float midpoint(const float* code, int j) { return (code[j] + code[j + 1]) * 0.5f; }

}  // namespace bnb
