// Turns values scaled to [-1, 1] into codes: the number of thresholds below them, where a threshold lies
// midway between neighbouring entries of the codebook (docs/SPEC.md section 2).
#pragma once

#include "../../csrc_shared/uniform_cells.h"
#include "common.h"

namespace bnb::BNB_TARGET {
namespace {

// The levels of a binary search over 2^depth - 1 ascending thresholds, stored breadth first. Branch-free: the
// upper levels are lookups in registers.
template <int level, int depth>
class SearchLevels {
 public:
  explicit SearchLevels(const float* thresholds)
      : pivots_(thresholds + (1 << level) - 1), below_(thresholds) {}
  BNB_INLINE I32 descend(I32 rank, F32 x) const {
    return below_.descend(increment(rank + rank, less(pivots_[rank], x)), x);
  }

 private:
  Table<1 << level> pivots_;
  SearchLevels<level + 1, depth> below_;
};

template <int depth>
class SearchLevels<depth, depth> {
 public:
  explicit SearchLevels(const float*) {}
  BNB_INLINE I32 descend(I32 rank, F32) const { return rank; }
};

// The thresholds of an ascending codebook of 2^depth entries, in the order that SearchLevels reads.
template <int depth>
struct Thresholds {
  float values[1 << depth];
  explicit Thresholds(const float* code) {
    for (int level = 0; level < depth; level++) {
      const int stride = 1 << (depth - level);
      for (int k = 0; k < 1 << level; k++) {
        values[(1 << level) - 1 + k] = midpoint(code, k * stride + stride / 2 - 1);
      }
    }
  }
};

// The thresholds of a 256-entry codebook by cell: a cell is the values whose sign, exponent and first seven
// mantissa bits agree. Where no cell holds two thresholds, one look-up finds the only one that a value must
// be compared with, and the number of those below its cell.
class Cells {
 public:
  // Left empty, and not usable, unless wanted.
  Cells(const float* code, bool wanted) : usable_(false) {
    if (!wanted) return;
    float smallest = 1.0f;
    for (int k = 0; k < kThresholds; k++) {
      const float magnitude = __builtin_fabsf(midpoint(code, k));
      if (magnitude < smallest) smallest = magnitude;
    }
    first_ = cell_of(smallest) - 1;  // it stands for all values that are smaller still
    count_ = cell_of(1.0f) + 1 - first_;
    usable_ = smallest > 0 && first_ >= 0 && count_ <= kMostCells && fill(code);
  }

  // Whether no cell has more than one threshold.
  bool usable() const { return usable_; }
  // Whether some thresholds are negative.
  bool both_signs() const { return both_signs_; }

  const int32_t* entries() const { return entries_; }
  int first() const { return first_; }
  int count() const { return count_; }

  static constexpr int32_t kLowBits = 0xffff;

 private:
  static constexpr int kThresholds = 255;
  static constexpr int kMostCells = 32 << 7;  // of one sign: 32 powers of two

  static int32_t bits_of(float x) {
    int32_t result;
    __builtin_memcpy(&result, &x, sizeof result);
    return result;
  }
  static int cell_of(float magnitude) { return bits_of(magnitude) >> 16; }

  // An entry holds the number of thresholds below its cell, over what is missing from the low bits of the
  // threshold in it to kLowBits: adding the low bits of a value carries where they are greater. Low bits are
  // inverted where values are negative, so that both signs compare alike.
  bool fill(const float* code) {
    int32_t* const positive = entries_;
    int32_t* const negative = entries_ + count_;
    int below = 0;
    while (below < kThresholds && midpoint(code, below) < 0) below++;
    const int negatives = below;
    both_signs_ = negatives > 0;
    for (int cell = 0; cell < count_; cell++) {
      if (!place(code, below, 1, kThresholds, first_ + cell, 0, positive[cell])) return false;
    }
    below = negatives - 1;
    for (int cell = 0; cell < count_; cell++) {
      if (!place(code, below, -1, -1, first_ + cell, kLowBits, negative[cell])) return false;
    }
    return true;
  }

  // Fills one cell and moves `next`, the next threshold away from zero, past it.
  static bool place(const float* code, int& next, int step, int end, int cell, int32_t inverted,
                    int32_t& entry) {
    const auto inside = [&] { return next != end && cell_of(__builtin_fabsf(midpoint(code, next))) == cell; };
    int32_t low = kLowBits;
    int below = step > 0 ? next : next + 1;
    if (inside()) {
      low = (bits_of(midpoint(code, next)) & kLowBits) ^ inverted;
      if (step < 0) below = next;
      next += step;
    }
    entry = below << 16 | (kLowBits - low);
    return !inside();
  }

  int first_, count_;
  bool usable_, both_signs_;
  int32_t entries_[2 * kMostCells];
};

// An encoder turns scaled values into codes; `zero` is its code of 0.0.

class SearchEncoder {
 public:
  SearchEncoder(const Thresholds<8>& thresholds, int zero) : zero(zero), levels_(thresholds.values) {}
  BNB_INLINE I32 operator()(F32 x) const { return levels_.descend(I32{}, x); }
  const int zero;

 private:
  SearchLevels<0, 8> levels_;
};

template <bool both_signs>
class CellEncoder {
 public:
  CellEncoder(const Cells& cells, int zero)
      : zero(zero),
        cells_(cells.entries() - cells.first()),
        first_(splat(cells.first())),
        count_(splat(cells.count())) {}
  BNB_INLINE I32 operator()(F32 x) const {
    if constexpr (both_signs) {
      const I32 sign = bits(x) >> 31;
      const I32 cell = max((bits(x) & 0x7fffffff) >> 16, first_) + (sign & count_);
      return (look_up(cells_, cell) + ((bits(x) ^ sign) & Cells::kLowBits)) >> 16;
    } else {
      const I32 cell = max(bits(x) >> 16, first_);  // the first one for a negative value as well
      return (look_up(cells_, cell) + (bits(x) & Cells::kLowBits)) >> 16;
    }
  }
  const int zero;

 private:
  const int32_t* cells_;  // where cell 0 would be
  I32 first_, count_;
};

// The same for a short codebook whose thresholds are more than 1/15 apart, with cells of equal width: 31 of
// them, which two registers hold.
template <int depth>
class UniformCells {
 public:
  explicit UniformCells(const float* code) {
    const UniformCellTable table = uniform_cell_table(code, 1 << depth);
    float below[kUniformTable];
    __builtin_memcpy(below, table.below, sizeof below);
    thresholds_ = Table<kUniformTable>(table.thresholds);
    below_ = Table<kUniformTable>(below);
  }
  BNB_INLINE I32 count_below(F32 x) const {
    const I32 cell = bits(x * splat(kUniformScale) + splat(kUniformShift));
    return increment(bits(below_[cell]), less(thresholds_[cell], x));
  }

 private:
  Table<kUniformTable> thresholds_, below_;
};

template <int depth>
class SearchTree {
 public:
  explicit SearchTree(const float* code) : thresholds_(code), levels_(thresholds_.values) {}
  SearchTree(const SearchTree& other) : thresholds_(other.thresholds_), levels_(thresholds_.values) {}
  BNB_INLINE I32 count_below(F32 x) const { return levels_.descend(I32{}, x); }

 private:
  Thresholds<depth> thresholds_;
  SearchLevels<0, depth> levels_;
};

// Compares with every threshold, which is less work than a search whose look-ups go to memory.
template <int depth>
class AllThresholds {
 public:
  explicit AllThresholds(const float* code) {
    for (int k = 0; k < kThresholds; k++) thresholds_[k] = splat(midpoint(code, k));
  }
  BNB_INLINE I32 count_below(F32 x) const {
    I32 count{};
    for (int k = 0; k < kThresholds; k++) count = increment(count, less(thresholds_[k], x));
    return count;
  }

 private:
  static constexpr int kThresholds = (1 << depth) - 1;
  F32 thresholds_[kThresholds];
};

template <int depth, int table_registers>
struct CodebookFor;
template <int depth>
struct CodebookFor<depth, 0> {
  using type = AllThresholds<depth>;
};
template <int depth>
struct CodebookFor<depth, 1> {
  using type = SearchTree<depth>;
};
template <int depth>
struct CodebookFor<depth, 2> {
  using type = UniformCells<depth>;
};
template <int depth>
using ShortCodebook = typename CodebookFor<depth, kTableRegisters>::type;

// The encoders of 4-bit formats, by their kind.

class NearestEncoder {
 public:
  explicit NearestEncoder(const Format4bit& format) : zero(format.zero), codebook_(format.codebook) {}
  BNB_INLINE I32 operator()(F32 x) const { return codebook_.count_below(x); }
  const int zero;

 private:
  ShortCodebook<4> codebook_;
};

class SignMagnitudeEncoder {
 public:
  explicit SignMagnitudeEncoder(const Format4bit& format)
      : SignMagnitudeEncoder(format.zero, ascending_magnitudes(format)) {}
  BNB_INLINE I32 operator()(F32 x) const {
    const I32 rank = codebook_.count_below(abs(x));
    const I32 code = bits(Table<8>(codes_)[rank]);
    return select(less(x, F32{}), code | 8, code);
  }
  const int zero;

 private:
  SignMagnitudeEncoder(int zero, const AscendingMagnitudes& magnitudes)
      : zero(zero), codebook_(magnitudes.values) {
    __builtin_memcpy(codes_, magnitudes.codes, sizeof codes_);
  }

  ShortCodebook<3> codebook_;
  float codes_[8];  // the integers' bits, by rank
};

struct Encoding4bit {
  // Calls f with the encoder of a format.
  template <class F>
  static void with_encoder(const Format4bit& format, const F& f) {
    switch (format.encoder) {
      case Encoder::nearest:
        return f(NearestEncoder(format));
      case Encoder::sign_magnitude:
        return f(SignMagnitudeEncoder(format));
    }
  }
};

// The entry nearest 0.0, the lower of two equally near.
int zero_code(const float* code) {
  const auto nearness = [](auto magnitude) { return -bits(magnitude); };
  I32 nearest = nearness(abs(load(code)));
  for (int i = kLanes; i < 256; i += kLanes) nearest = max(nearest, nearness(abs(load(code + i))));
  const int32_t found = reduce_max(nearest);
  int i = 0;
  while (nearness(abs(splat(code[i])))[0] != found) i++;
  return i;
}

// What encoding with a 256-entry codebook needs, found once for a tensor of n elements.
class BlockwiseEncoding {
 public:
  BlockwiseEncoding(const float* code, int64_t n)
      : table(code), zero(zero_code(code)), thresholds_(code), cells_(code, n >= kLeastForCells) {}

  // Calls f with an encoder.
  template <class F>
  void with_encoder(const F& f) const {
    if (!cells_.usable()) return f(SearchEncoder(thresholds_, zero));
    if (cells_.both_signs()) return f(CellEncoder<true>(cells_, zero));
    f(CellEncoder<false>(cells_, zero));
  }

  const ByteTable table;
  const int zero;

 private:
  // Filling the cells takes as long as searching for these.
  static constexpr int64_t kLeastForCells = 1 << 15;

  Thresholds<8> thresholds_;
  Cells cells_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
