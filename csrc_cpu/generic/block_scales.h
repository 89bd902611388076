// The scales of the blocks of a 4-bit tensor, double-quantized or not (docs/SPEC.md section 2).
#pragma once

#include "common.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kCacheLine = 64;

class StoredScales {
 public:
  StoredScales(const BlockScales& scales, int64_t blocks)
      : scales(scales), blocks(blocks), nested_code_(scales.nested_code) {}

  const BlockScales& scales;
  const int64_t blocks;

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
    const F32 offset = splat(*scales.offset);
    const uint8_t* const next = scales.codes + block + count;
    for (int64_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(next + i);
    for (const int64_t end = block + count; block < end;) {
      const int64_t nested_block = (scales.first_block + block) / scales.nested_blocksize;
      const int64_t next_nested = (nested_block + 1) * scales.nested_blocksize - scales.first_block;
      const int64_t length = min(end, next_nested) - block;
      const F32 nested_absmax = splat(scales.nested_absmax[nested_block]);
      nested_code_.for_each(scales.codes + block, length, [&](int64_t i, auto lanes, F32 values) {
        store(out + i, values * nested_absmax + offset, lanes);
      });
      block += length;
      out += length;
    }
  }

 private:
  const ByteTable nested_code_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
