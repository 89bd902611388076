// The scales of the blocks of a 4-bit tensor, double-quantized or not (docs/SPEC.md section 2).
#pragma once

#include "common.h"

namespace bnb::BNB_TARGET {
namespace {

struct StoredScales {
  const BlockScales& scales;
  int64_t blocks;

  // The scales of some blocks, with kLanes more floats to read behind them. `buffer` holds count + kLanes.
  const float* read(int64_t block, int64_t count, float* buffer) const {
    if (!scales.absmax) {
      decode(block, count, buffer);
    } else if (block + count + kLanes <= blocks) {
      return scales.absmax + block;
    } else {
      __builtin_memcpy(buffer, scales.absmax + block, count * sizeof(float));
    }
    store(buffer + count, F32{});
    return buffer;
  }

  void decode(int64_t block, int64_t count, float* out) const {
    const Table<256> nested_code(scales.nested_code);
    const F32 offset = splat(*scales.offset);
    for (const int64_t end = block + count; block < end;) {
      const int64_t nested_block = block / scales.nested_blocksize;
      const int64_t length = min(end, (nested_block + 1) * scales.nested_blocksize) - block;
      const F32 nested_absmax = splat(scales.nested_absmax[nested_block]);
      for_each_vector(length, [&](int64_t i, auto lanes) {
        const I32 code = load(scales.codes + block + i, lanes);
        store(out + i, nested_code[code] * nested_absmax + offset, lanes);
      });
      block += length;
      out += length;
    }
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
