// What the address and thread sanitizers are told of fibers, and of what orders them; nothing in other
// builds.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define BNB_SIMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BNB_SIMULATOR_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define BNB_SIMULATOR_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define BNB_SIMULATOR_TSAN 1
#endif
#endif

#if defined(BNB_SIMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(BNB_SIMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace bnb::simulator {

#if defined(BNB_SIMULATOR_TSAN)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// What happened before release(order) in one thread happens before what follows acquire(order) in another.
inline void release([[maybe_unused]] void* order) {
#if defined(BNB_SIMULATOR_TSAN)
  __tsan_release(order);
#endif
}
inline void acquire([[maybe_unused]] void* order) {
#if defined(BNB_SIMULATOR_TSAN)
  __tsan_acquire(order);
#endif
}

// The simulator's own accesses are ordered by the fibers' switches, which the thread sanitizer must not count
// as order among the threads of a kernel: it looks away while the simulator runs.
inline void enter_simulator() {
#if defined(BNB_SIMULATOR_TSAN)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}
inline void leave_simulator() {
#if defined(BNB_SIMULATOR_TSAN)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

class InSimulator {
 public:
  InSimulator() { enter_simulator(); }
  ~InSimulator() { leave_simulator(); }
  InSimulator(const InSimulator&) = delete;
  InSimulator& operator=(const InSimulator&) = delete;
};

}  // namespace bnb::simulator
