// Barriers, votes, shuffles and fences, in CUDA's form (with a mask of lanes) and HIP's (without).
#pragma once

#include <cstring>
#include <type_traits>

#include "half.h"
#include "language.h"
#include "threads.h"

namespace bnb::simulator {

template <class T>
constexpr bool kShuffled =
    std::is_arithmetic_v<T> || std::is_same_v<T, __half> || std::is_same_v<T, __half2> ||
    std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __nv_bfloat162>;

template <class Mask>
constexpr int kMaskBits = static_cast<int>(sizeof(Mask)) * 8;

template <class Mask>
uint64_t mask_bits(Mask mask) {
  static_assert(std::is_integral_v<Mask>, "a mask of lanes is an integer");
  return static_cast<std::make_unsigned_t<Mask>>(mask);
}

template <class T>
T shuffle(const char* name, Site site, Exchange kind, int mask_bits, uint64_t mask, T value, int operand,
          int width) {
  static_assert(kShuffled<T> && sizeof(T) <= 8, "devices shuffle numbers of up to 8 bytes");
  WarpRequest request{name, site, kind, mask_bits, mask, width, 0, sizeof(T), operand};
  std::memcpy(&request.value, &value, sizeof(T));
  const uint64_t received = exchange(request);
  std::memcpy(&value, &received, sizeof(T));
  return value;
}

template <class Mask>
uint64_t vote(const char* name, Site site, Mask mask, bool predicate) {
  WarpRequest request{name, site, Exchange::vote, kMaskBits<Mask>, mask_bits(mask), 0, predicate, 1, 0};
  return exchange(request);
}

inline uint64_t wave_vote(const char* name, Site site, bool predicate) {
  WarpRequest request{name, site, Exchange::vote, 0, 0, 0, predicate, 1, 0};
  return exchange(request);
}

}  // namespace bnb::simulator

// The last parameter of what waits for others.
#define BNB_SIMULATOR_SITE bnb::simulator::Site site = bnb::simulator::Site::here()

inline void __syncthreads(BNB_SIMULATOR_SITE) { bnb::simulator::barrier("__syncthreads", site); }
inline int __syncthreads_count(int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::barrier("__syncthreads_count", site, predicate != 0);
}
inline int __syncthreads_or(int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::barrier("__syncthreads_or", site, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::barrier("__syncthreads_and", site, predicate == 0) == 0;
}

// A shuffle with a mask (CUDA) and without (HIP): T name_sync(mask, value, operand, width) and
// T name(value, operand, width).
#define BNB_SIMULATOR_SHUFFLE(name, kind)                                                                   \
  template <class Mask, class T>                                                                            \
  T name##_sync(Mask mask, T value, int operand, int width = warpSize, BNB_SIMULATOR_SITE) {                \
    return bnb::simulator::shuffle(#name "_sync", site, bnb::simulator::Exchange::kind,                     \
                                   bnb::simulator::kMaskBits<Mask>, bnb::simulator::mask_bits(mask), value, \
                                   operand, width);                                                         \
  }                                                                                                         \
  template <class T>                                                                                        \
  T name(T value, int operand, int width = warpSize, BNB_SIMULATOR_SITE) {                                  \
    return bnb::simulator::shuffle(#name, site, bnb::simulator::Exchange::kind, 0, 0, value, operand,       \
                                   width);                                                                  \
  }

BNB_SIMULATOR_SHUFFLE(__shfl, index)
BNB_SIMULATOR_SHUFFLE(__shfl_up, up)
BNB_SIMULATOR_SHUFFLE(__shfl_down, down)
BNB_SIMULATOR_SHUFFLE(__shfl_xor, exclusive_or)

#undef BNB_SIMULATOR_SHUFFLE

template <class Mask>
std::make_unsigned_t<Mask> __ballot_sync(Mask mask, int predicate, BNB_SIMULATOR_SITE) {
  return static_cast<std::make_unsigned_t<Mask>>(
      bnb::simulator::vote("__ballot_sync", site, mask, predicate != 0));
}
template <class Mask>
int __any_sync(Mask mask, int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::vote("__any_sync", site, mask, predicate != 0) != 0;
}
template <class Mask>
int __all_sync(Mask mask, int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::vote("__all_sync", site, mask, predicate == 0) == 0;
}

inline unsigned long long __ballot(int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::wave_vote("__ballot", site, predicate != 0);
}
inline int __any(int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::wave_vote("__any", site, predicate != 0) != 0;
}
inline int __all(int predicate, BNB_SIMULATOR_SITE) {
  return bnb::simulator::wave_vote("__all", site, predicate == 0) == 0;
}

// Without a mask, every lane of the warp.
inline void __syncwarp(BNB_SIMULATOR_SITE) { bnb::simulator::wave_vote("__syncwarp", site, true); }
template <class Mask, class = std::enable_if_t<std::is_integral_v<Mask>>>
void __syncwarp(Mask mask, BNB_SIMULATOR_SITE) {
  bnb::simulator::vote("__syncwarp", site, mask, true);
}

inline void __threadfence_block() { bnb::simulator::fence(); }
inline void __threadfence() { bnb::simulator::fence(); }
inline void __threadfence_system() { bnb::simulator::fence(); }

[[noreturn]] inline void __trap(BNB_SIMULATOR_SITE) { bnb::simulator::fail("__trap() was called", site); }

#undef BNB_SIMULATOR_SITE
