// How kernels are run; set between launches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device/asynchronous.h"

namespace bnb::simulator {

// 32 or 64 lanes; throws std::invalid_argument for another number.
void set_warp_size(int lanes);
int warp_size();

// The order in which blocks, and the threads of a block that can go on, take their turns: "forward",
// "reverse" or "shuffled:SEED" with a whole number; throws std::invalid_argument for anything else. What a
// thread starts and does not wait for happens at once or as late as it may: in "forward" copies at once and
// products late, in "reverse" the other way round.
void set_order(const std::string& order);
std::string order();

// Whether the i-th of a thread's copies or products happens only when it is waited for.
bool happens_late(Unit unit, uint64_t i);

// OS threads that run blocks, from 1; block i runs on thread i modulo their number.
void set_workers(int workers);
int workers();

// Whether the device is taken to capture a graph of the calls made to it.
void set_capturing(bool is_capturing);
bool capturing();

// A sequence of turns, started anew for each block.
class Turns {
 public:
  explicit Turns(uint64_t stream);

  // The i-th of n, when each gets one turn.
  uint64_t pick(uint64_t i, uint64_t n) const;

  // Puts next the one whose turn it is among those waiting, given in ascending order of their turns.
  template <class T>
  T take(std::vector<T>& waiting) {
    if (kind_ == Kind::shuffled) std::swap(waiting[random() % waiting.size()], waiting.back());
    const T taken = waiting.back();
    waiting.pop_back();
    return taken;
  }
  // Whether the first of several that can go on are to be put last, as take() takes the last.
  bool last_first() const { return kind_ != Kind::reverse; }

  enum class Kind { forward, reverse, shuffled };

 private:
  uint64_t random();

  Kind kind_;
  uint64_t state_;
};

}  // namespace bnb::simulator
