// bfloat16 for HIP before 5.7, which has no header of this name. It is searched for last: where there is one,
// that one serves.
#pragma once

#include <hip/hip_runtime.h>

#include <cstdint>

struct __hip_bfloat16 {
  uint16_t data;
};

__device__ inline float __bfloat162float(__hip_bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.data) << 16);
}

// To nearest even; a NaN stays one.
__device__ inline __hip_bfloat16 __float2bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(value != value ? 0x7fff : rounded >> 16)};
}
