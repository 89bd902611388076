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

  StoredScales stored_scales() const { return {scales, blocks()}; }
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
    const float* scales = w_.stored_scales().read(first, last + 1 - first, buffer_.data());
    return {scales, first, w_.block_shift()};
  }

 private:
  const Weight& w_;
  Buffer<float> buffer_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
