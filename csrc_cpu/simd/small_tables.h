// Tables whose values one vector holds, by permute(values, i), which takes a lane of `values` for each of i.
#pragma once

namespace bnb::BNB_TARGET {
namespace {

// Looks lanes up in `size` floats, a power of two; an index counts modulo 16 where size is 16.
template <int size, bool fits_a_vector = (size <= kLanes)>
class Table;

template <int size>
class Table<size, true> {
 public:
  explicit Table(const float* values) {
    if constexpr (size == kLanes) {
      values_ = load(values);
    } else {
      float padded[kLanes] = {};
      __builtin_memcpy(padded, values, size * sizeof(float));
      values_ = load(padded);
    }
  }
  F32 operator[](I32 i) const { return permute(values_, i); }

 private:
  F32 values_;
};

}  // namespace
}  // namespace bnb::BNB_TARGET
