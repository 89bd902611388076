// The scales of a 4-bit weight [N, K], by row (docs/SPEC.md sections 2 and 3).
#pragma once

#include "block_scales.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kWordShift = 3;
constexpr int kWord = 1 << kWordShift;  // elements in a 32-bit word of packed codes
constexpr int kPrefetchBytes = 2048;    // ahead of what is read of a weight

inline StoredScales stored_scales(const Weight4bit& w) { return {w.scales, w.blocks()}; }

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
  RowScalesReader(const Weight4bit& w, int64_t most_rows)
      : K_(w.K),
        shift_(w.block_shift()),
        stored_(stored_scales(w)),
        buffer_((most_rows * K_ >> shift_) + 2 + kLanes) {}
  RowScales read(int64_t n, int64_t count) const {
    const int64_t first = n * K_ >> shift_;
    const int64_t last = ((n + count) * K_ - 1) >> shift_;
    return {stored_.read(first, last + 1 - first, buffer_.data()), first, shift_};
  }

 private:
  const int64_t K_;
  const int shift_;
  const StoredScales stored_;
  Buffer<float> buffer_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
