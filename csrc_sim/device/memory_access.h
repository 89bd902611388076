// Loads and stores with a hint for the cache, and atomic operations, which order nothing around them.
#pragma once

#include <type_traits>

#include "language.h"
#include "numbers.h"

#define BNB_SIMULATOR_LOAD(name) \
  template <class T>             \
  T name(const T* address) {     \
    return *address;             \
  }
#define BNB_SIMULATOR_STORE(name)  \
  template <class T>               \
  void name(T* address, T value) { \
    *address = value;              \
  }

BNB_SIMULATOR_LOAD(__ldg)
BNB_SIMULATOR_LOAD(__ldca)
BNB_SIMULATOR_LOAD(__ldcg)
BNB_SIMULATOR_LOAD(__ldcs)
BNB_SIMULATOR_LOAD(__ldlu)
BNB_SIMULATOR_LOAD(__ldcv)
BNB_SIMULATOR_STORE(__stwb)
BNB_SIMULATOR_STORE(__stcg)
BNB_SIMULATOR_STORE(__stcs)
BNB_SIMULATOR_STORE(__stwt)

#undef BNB_SIMULATOR_LOAD
#undef BNB_SIMULATOR_STORE

namespace bnb::simulator {

template <class T>
struct Operand {
  using type = T;
};

// Replaces *address by combine(*address, value); returns what was there.
template <class T, class Combine>
T atomic_update(T* address, T value, Combine combine) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  T desired = combine(old, value);
  while (!__atomic_compare_exchange(address, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    desired = combine(old, value);
  return old;
}

}  // namespace bnb::simulator

#define BNB_SIMULATOR_ATOMIC(name, expression)                                                     \
  template <class T>                                                                               \
  T name(T* address, typename bnb::simulator::Operand<T>::type value) {                            \
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "32 or 64 bits"); \
    return bnb::simulator::atomic_update(address, value,                                           \
                                         [](T a, T b) { return static_cast<T>(expression); });     \
  }

BNB_SIMULATOR_ATOMIC(atomicAdd, a + b)
BNB_SIMULATOR_ATOMIC(atomicSub, a - b)
BNB_SIMULATOR_ATOMIC(atomicMin, b < a ? b : a)
BNB_SIMULATOR_ATOMIC(atomicMax, a < b ? b : a)
BNB_SIMULATOR_ATOMIC(atomicAnd, a& b)
BNB_SIMULATOR_ATOMIC(atomicOr, a | b)
BNB_SIMULATOR_ATOMIC(atomicXor, a ^ b)
BNB_SIMULATOR_ATOMIC(atomicExch, (static_cast<void>(a), b))
BNB_SIMULATOR_ATOMIC(atomicInc, a >= b ? 0 : a + 1)

#undef BNB_SIMULATOR_ATOMIC

template <class T>
T atomicCAS(T* address, typename bnb::simulator::Operand<T>::type expected,
            typename bnb::simulator::Operand<T>::type desired) {
  __atomic_compare_exchange(address, &expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
