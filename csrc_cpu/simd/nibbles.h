// Looks up many codes of 4 bits at once, a vector after the other.
#pragma once

namespace bnb::BNB_TARGET {
namespace {

// A vector of words from memory, in one view for each of their bytes: a load is cheaper than a shift.
struct Words {
  I32 from_byte[4];
  explicit Words(const uint8_t* p) {
    for (int i = 0; i < 4; i++) from_byte[i] = load_words(p + i);
  }
  BNB_INLINE I32 nibble(int i) const { return from_byte[i / 2] >> (4 * (i % 2)); }
};

// A vector of words from different places.
struct GatheredWords {
  I32 words;
  BNB_INLINE I32 nibble(int i) const { return words >> (4 * i); }
};

// Rows of a weight that are decoded side by side, where sums of few rows of A are kept in registers.
constexpr int kStreams = kRegisters / 8;

// Element i: what the i-th nibble of every word stands for by a table, the lowest one first.
template <class AnyTable, class AnyWords>
class NibbleValues {
 public:
  NibbleValues(const AnyTable& table, const AnyWords& words) : table_(table), words_(words) {}
  BNB_INLINE auto operator[](int i) const { return table_[words_.nibble(i)]; }

 private:
  const AnyTable& table_;
  const AnyWords& words_;
};

// What each of 16 codes stands for.
class NibbleTable {
 public:
  explicit NibbleTable(const float* values) : table(values) {}

  template <class AnyWords>
  BNB_INLINE NibbleValues<Table<16>, AnyWords> operator()(const AnyWords& words) const {
    return {table, words};
  }

  // Consecutive elements, the first in the high nibble of a byte.
  struct Span {
    static constexpr int kVectors = 1;
    F32 values[kVectors];
  };
  BNB_INLINE Span span(const uint8_t* p) const { return {{table[load_nibbles(p)]}}; }

  const Table<16> table;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
