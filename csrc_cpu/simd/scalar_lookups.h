// Look-ups lane by lane, for instruction sets of four lanes that have no gather.
#pragma once

namespace bnb::BNB_TARGET {
namespace {

BNB_INLINE F32 look_up(const float* values, I32 i) {
  return F32{values[i[0]], values[i[1]], values[i[2]], values[i[3]]};
}
BNB_INLINE I32 look_up(const int32_t* values, I32 i) {
  return I32{values[i[0]], values[i[1]], values[i[2]], values[i[3]]};
}

// Words at any bytes.
BNB_INLINE I32 gather_words(const uint8_t* p, I32 offsets) {
  I32 words;
  for (int i = 0; i < kLanes; i++) {
    int32_t word;
    __builtin_memcpy(&word, p + offsets[i], sizeof word);
    words[i] = word;
  }
  return words;
}

}  // namespace
}  // namespace bnb::BNB_TARGET
