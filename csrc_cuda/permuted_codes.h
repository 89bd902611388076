// The values of 4-bit codes by byte permutations of registers, in place of look-ups in shared memory: where
// those fill its pipe, some of the codes are better decoded so.
#pragma once

#include "pair_table.h"

namespace bnb {

// The values of all 16 codes, for half and bfloat16: their low bytes and their high bytes.
template <class T>
class PermutedCodes {
 public:
  explicit __device__ PermutedCodes(const PairTable<T>& table) {
#pragma unroll
    for (uint32_t code = 0; code < 16; code++) {
      const uint32_t value = bits_of_pair(table.of_byte(code << 4 | code, 0)) & 0xffff;
      const uint32_t place = code % 4 * 8;
      low_[code / 4] = (code % 4 ? low_[code / 4] : 0) | (value & 0xff) << place;
      high_[code / 4] = (code % 4 ? high_[code / 4] : 0) | value >> 8 << place;
    }
  }

  // The pairs of the two bytes of a half of the word, each the earlier element first.
  __device__ void of_half(uint32_t word, int half, uint32_t (&pairs)[2]) const {
    const uint32_t codes = word >> (16 * half);
    const uint32_t among_eight = codes & 0x7777;
    const uint32_t upper_eight = (codes >> 1 & 0x4444) | 0x3210;  // byte i of the one or of the other
    const uint32_t low = values(low_, among_eight, upper_eight);
    const uint32_t high = values(high_, among_eight, upper_eight);
    pairs[0] = __byte_perm(low, high, 0x4051);  // the earlier element is in the high nibble
    pairs[1] = __byte_perm(low, high, 0x6273);
  }

 private:
  __device__ static uint32_t values(const uint32_t (&bytes)[4], uint32_t among_eight, uint32_t upper_eight) {
    return __byte_perm(__byte_perm(bytes[0], bytes[1], among_eight),
                       __byte_perm(bytes[2], bytes[3], among_eight), upper_eight);
  }

  uint32_t low_[4], high_[4];
};

}  // namespace bnb
