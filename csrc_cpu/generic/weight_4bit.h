// A 4-bit weight [N, K] as the checkpoint stores it, and its scales (docs/SPEC.md sections 2 and 3).
#pragma once

#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kWordShift = 3;
constexpr int kWord = 1 << kWordShift;  // elements in a 32-bit word of packed codes
constexpr int kPrefetchBytes = 2048;    // ahead of what is read of a weight

struct Weight {
  int64_t N, K;
  const uint8_t* packed;
  BlockScales scales;
  int64_t blocksize;
  const float* code;

  int64_t bytes() const { return (N * K + 1) / 2; }
  int block_shift() const { return __builtin_ctzll(blocksize); }
  int64_t blocks() const { return ((N * K - 1) >> block_shift()) + 1; }

  // The scales of some blocks, with kLanes more floats to read behind them. `buffer` holds
  // count + kLanes.
  const float* read_scales(int64_t block, int64_t count, float* buffer) const {
    if (!scales.absmax) {
      decode_scales(block, count, buffer);
    } else if (block + count + kLanes <= blocks()) {
      return scales.absmax + block;
    } else {
      __builtin_memcpy(buffer, scales.absmax + block, count * sizeof(float));
    }
    store(buffer + count, F32{});
    return buffer;
  }

  void decode_scales(int64_t block, int64_t count, float* out) const {
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

// The scales of some rows of W, by flat element.
struct RowScales {
  const float* scales;
  int64_t first_block;
  int shift;

  BNB_INLINE const float* at(int64_t element) const { return scales + (element >> shift) - first_block; }
};

// Reads the scales of up to `most_rows` rows at a time.
class RowScalesReader {
 public:
  RowScalesReader(const Weight& w, int64_t most_rows)
      : w_(w), buffer_((most_rows * w.K >> w.block_shift()) + 2 + kLanes) {}
  RowScales read(int64_t n, int64_t count) const {
    const int64_t first = n * w_.K >> w_.block_shift();
    const int64_t last = ((n + count) * w_.K - 1) >> w_.block_shift();
    return {w_.read_scales(first, last + 1 - first, buffer_.data()), first, w_.block_shift()};
  }

 private:
  const Weight& w_;
  Buffer<float> buffer_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
