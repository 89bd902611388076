// The 4-bit formats, a row each (docs/SPEC.md section 1): what a code stands for and how a value becomes one.
// bnb_core/formats.py has the same rows for Python, by the same names.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace bnb {

enum class QuantType : int32_t { fp4 = 0, nf4 = 1 };

// How a value scaled to [-1, 1] becomes a code.
enum class Encoder : int32_t {
  nearest,         // the codebook ascends: the number of thresholds below the value
  sign_magnitude,  // bit 3 is the sign; the nearest of the magnitudes in codes 0 to 7, in any order
};

struct Format4bit {
  const char* name;
  QuantType quant_type;
  float codebook[16];
  Encoder encoder;
  int zero;  // the code of 0.0
  // What codes are multiplied by before they are rounded to a half precision, and sums of them divided by, so
  // that as many as possible are all but representable. 1 is right for any format.
  float bf16_factor, f16_factor;
};

// In the order of QuantType.
//
// FP4: the sign in bit 3, a magnitude in the low three bits that is not in ascending order. With its factors
// all codes are exact. NF4: NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E), ascending; with its factors
// the worst code is off by 2^-9.3 in bfloat16 and 2^-12.6 in half, half of what rounding may do.
constexpr Format4bit kFormats[] = {
    {"fp4",
     QuantType::fp4,
     {0.0f, 1.0f / 192, 2.0f / 3, 1.0f, 1.0f / 3, 0.5f, 1.0f / 6, 0.25f,  //
      0.0f, -1.0f / 192, -2.0f / 3, -1.0f, -1.0f / 3, -0.5f, -1.0f / 6, -0.25f},
     Encoder::sign_magnitude,
     0,
     3.0f,
     3.0f},
    {"nf4",
     QuantType::nf4,
     {-0x1.000000p+0f, -0x1.647362p-1f, -0x1.0cd660p-1f, -0x1.946540p-2f, -0x1.23449ap-2f, -0x1.7a6a7ep-3f,
      -0x1.74f0e2p-4f, 0x0.000000p+0f, 0x1.45f5fep-4f, 0x1.4995c6p-3f, 0x1.f809bap-3f, 0x1.5a0674p-2f,
      0x1.c34970p-2f, 0x1.200f56p-1f, 0x1.722766p-1f, 0x1.000000p+0f},
     Encoder::nearest,
     7,
     0x1.3055e8p+0f,
     0x1.a374b0p+0f},
};

BNB_ALWAYS_INLINE constexpr const Format4bit& format_of(QuantType quant_type) {
  return kFormats[static_cast<int32_t>(quant_type)];
}

// The magnitudes of a format with a sign, ascending, and the code of each: what its encoder looks up.
struct AscendingMagnitudes {
  float values[8];
  int codes[8];
};

BNB_ALWAYS_INLINE constexpr AscendingMagnitudes ascending_magnitudes(const Format4bit& format) {
  AscendingMagnitudes result{};
  for (int code = 0; code < 8; code++) {
    int rank = 0;
    for (int other = 0; other < 8; other++) rank += format.codebook[other] < format.codebook[code];
    result.values[rank] = format.codebook[code];
    result.codes[rank] = code;
  }
  return result;
}

// The threshold between entries j and j + 1 of an ascending codebook; a value equal to it takes entry j.
BNB_HOST_DEVICE BNB_ALWAYS_INLINE constexpr float midpoint(const float* code, int j) {
  return (code[j] + code[j + 1]) * 0.5f;
}

}  // namespace bnb
