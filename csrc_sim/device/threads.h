// What a thread of a kernel asks of the simulator: to wait for others, to exchange values, to report a fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bnb {
namespace simulator {

// A place in a source file. As a default argument, the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
inline bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Waits for every thread of the block; returns how many gave a true predicate.
int barrier(const char* name, Site site, bool predicate = true);

enum class Exchange { vote, index, up, down, exclusive_or };

// What a lane brings to an operation of its warp.
struct WarpRequest {
  const char* name;
  Site site;
  Exchange exchange;
  int mask_bits;   // width of the mask's type, 0 for an operation without a mask
  uint64_t mask;   // the lanes that take part; without a mask, the `width` neighbouring ones
  int width;       // lanes in a group of a shuffle, 0 for the whole warp
  uint64_t value;  // a vote's predicate or a shuffle's value
  int bytes;       // of the value
  int operand;     // the shuffle's source lane, distance or lane mask
};

// Waits for the lanes that take part; returns the votes as bits or the value of the source lane.
uint64_t exchange(WarpRequest& request);

// Orders this thread's accesses with those of other threads around their fences.
void fence();

// Ends the launch with this message, the kernel's name, block and thread; the launch throws it.
[[noreturn]] void fail(const char* message, Site site = Site::here());

}  // namespace simulator

// The shared memory whose size the launch gave.
void* simulated_dynamic_shared();

}  // namespace bnb
