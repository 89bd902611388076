// Vectors of 64 bytes as numbers of one kind, which C++ computes with lane by lane.
#pragma once

#include <cstdint>
#include <cstring>

#define BNB_SIMULATED static inline

namespace bnb {
namespace {

template <class Lane>
struct Vector64 {
  static constexpr int kLanes = 64 / sizeof(Lane);
  typedef Lane type __attribute__((vector_size(64)));
};

template <class Lane>
using Lanes = typename Vector64<Lane>::type;

template <class Lane>
constexpr int kLanesOf = Vector64<Lane>::kLanes;

// The vector whose lane i is lane_at(i).
template <class Lane, class LaneAt>
BNB_SIMULATED Lanes<Lane> each_lane(const LaneAt& lane_at) {
  Lanes<Lane> result;
  for (int i = 0; i < kLanesOf<Lane>; i++) result[i] = static_cast<Lane>(lane_at(i));
  return result;
}

// The mask whose bit i is whether holds(i).
template <class Lane, class Holds>
BNB_SIMULATED uint64_t each_bit(const Holds& holds) {
  uint64_t mask = 0;
  for (int i = 0; i < kLanesOf<Lane>; i++) mask |= static_cast<uint64_t>(holds(i) ? 1 : 0) << i;
  return mask;
}

BNB_SIMULATED bool is_set(uint64_t mask, int lane) { return (mask >> lane & 1) != 0; }

// A lane of `yes` where the mask has its bit, of `no` elsewhere.
template <class Lane>
BNB_SIMULATED __m512i blend(uint64_t mask, __m512i no, __m512i yes) {
  const auto n = (Lanes<Lane>)no, y = (Lanes<Lane>)yes;
  return (__m512i)each_lane<Lane>([&](int i) { return is_set(mask, i) ? y[i] : n[i]; });
}

template <class Half, class Whole>
BNB_SIMULATED Half half_of(const Whole& x, int place) {
  Half result;
  std::memcpy(&result, reinterpret_cast<const char*>(&x) + place * sizeof result, sizeof result);
  return result;
}

// A function of AVX2's, on both halves of vectors.
template <class Half, class Function, class Whole, class... Wholes>
BNB_SIMULATED Whole by_halves(const Function& function, Whole first, Wholes... others) {
  const Half halves[2] = {function(half_of<Half>(first, 0), half_of<Half>(others, 0)...),
                          function(half_of<Half>(first, 1), half_of<Half>(others, 1)...)};
  Whole result;
  std::memcpy(&result, halves, sizeof result);
  return result;
}

}  // namespace
}  // namespace bnb
