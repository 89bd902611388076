// The two values of every packed byte of codes, in shared memory so often that no two lanes that are served
// at once ever want the same bank: pairs of 4 bytes once for each lane of a warp, pairs of 8 for half a warp.
#pragma once

#include "weight_4bit.h"

namespace bnb {

// [256][kCopies][2] of T, the earlier element first.
template <class T>
class PairTable {
 public:
  using Pair = Pack<T, 2>;
  static constexpr int kPairBytes = 2 * static_cast<int>(sizeof(T));
  static constexpr int kCopiesBytes = 128;  // all banks
  static constexpr int kCopies = kCopiesBytes / kPairBytes;
  static constexpr int kBytes = 256 * kCopiesBytes;

  explicit __device__ PairTable(unsigned char* shared) : shared_(shared) {}

  // Values of codes, times a factor. All `threads` of the block call it, and a barrier follows before the
  // first look-up.
  template <int threads, class Codebook>
  __device__ void fill(const Codebook& codebook, float factor = 1.0f) const {
    constexpr int kEqual = kAccessBytes / kPairBytes;  // copies written at once
    constexpr int kAccesses = kCopies / kEqual;
    const float value = value_of_lane(codebook) * factor;
    for (int i = static_cast<int>(threadIdx.x); i < 256 * kAccesses; i += threads) {
      const T first = from_float<T>(shuffle(value, i / kAccesses >> 4)),
              second = from_float<T>(shuffle(value, i / kAccesses & 15));
      Pack<T, 2 * kEqual> pairs;
#pragma unroll
      for (int j = 0; j < kEqual; j++) {
        pairs[2 * j] = first;
        pairs[2 * j + 1] = second;
      }
      reinterpret_cast<Pack<T, 2 * kEqual>*>(shared_)[i] = pairs;
    }
  }

  // The pair of a byte of the word. A rotation and one logical operation make its place.
  __device__ Pair of_byte(uint32_t word, int byte) const {
    constexpr int kPlaceBits = 7;
    static_assert(kCopiesBytes == 1 << kPlaceBits);
    const int rotation = (byte * 8 - kPlaceBits) & 31;
    const uint32_t place = (word >> rotation | word << (32 - rotation)) & (255 << kPlaceBits);
    return *reinterpret_cast<const Pair*>(shared_ + (place | lane() % kCopies * kPairBytes));
  }

 private:
  unsigned char* shared_;
};

}  // namespace bnb
