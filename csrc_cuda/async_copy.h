// Copies from global to shared memory that a thread starts and does not wait for, where the chip has them.
#pragma once

#include "device.h"

namespace bnb {

// How often what is copied is read: what is read once leaves the L2 first.
enum class Reads { many, once };

// Copies 16 bytes, or writes zeros where `valid` is false; both addresses are multiples of 16. The 128 bytes
// around them come into the L2: a neighbour's copy or the next one's wants them.
template <Reads reads = Reads::many>
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (reads == Reads::once) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(address),
                 "l"(global), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  }
#else
  const auto copy = [=] {
    using Piece = Pack<uint32_t, 4>;
    *static_cast<Piece*>(shared) = valid ? *static_cast<const Piece*>(global) : Piece{};
  };
#if defined(BNB_SIMULATED)
  simulator::start(simulator::Unit::copies, copy);
#else
  copy();
#endif
#endif
}

// Makes a group of the copies that this thread has started since the last one.
__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(BNB_SIMULATED)
  simulator::commit(simulator::Unit::copies);
#endif
}

// Waits for all groups of this thread's copies but the last `pending`; a barrier shows them to the others.
template <int pending>
__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#elif defined(BNB_SIMULATED)
  simulator::wait(simulator::Unit::copies, pending);
#endif
}

// Waits for all of them.
__device__ inline void wait_for_copies() {
  commit_copies();
  wait_for_copies<0>();
}

// A load of what is read once: it passes by the L1 cache, and fetches its 128 bytes into the L2.
template <int words>
__device__ inline Pack<uint32_t, words> load_streaming(const void* global) {
#if defined(__CUDA_ARCH__)
  Pack<uint32_t, words> value;
  if constexpr (words == 1)
    asm("ld.global.nc.L1::no_allocate.L2::128B.b32 %0, [%1];" : "=r"(value[0]) : "l"(global));
  else if constexpr (words == 2)
    asm("ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {%0, %1}, [%2];"
        : "=r"(value[0]), "=r"(value[1])
        : "l"(global));
  else
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
        : "l"(global));
  return value;
#else
  return *static_cast<const Pack<uint32_t, words>*>(global);
#endif
}

}  // namespace bnb
