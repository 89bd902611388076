// What a thread has started and not waited for, in groups.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "device/asynchronous.h"
#include "settings.h"

namespace bnb::simulator {

class Started {
 public:
  using Group = std::vector<std::function<void()>>;

  // Whether the next operation is kept for the wait, rather than done at once.
  bool keeps_next(Unit unit) { return happens_late(unit, count_++); }
  void add(std::function<void()> operation) { groups_.back().push_back(std::move(operation)); }
  void commit() { groups_.emplace_back(); }
  // The oldest group unless it is among the last `pending` ones; empty if there is none to take.
  Group take(int pending);
  void clear();
  bool has_any() const;

 private:
  std::deque<Group> groups_{1};  // the last one is being made
  uint64_t count_ = 0;           // of operations
};

}  // namespace bnb::simulator
