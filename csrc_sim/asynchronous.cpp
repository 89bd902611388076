#include "asynchronous.h"

#include <algorithm>
#include <utility>

#include "block.h"
#include "device/asynchronous.h"
#include "sanitizers.h"

namespace bnb::simulator {

Started::Group Started::take(int pending) {
  Group oldest;
  while (oldest.empty() && static_cast<int>(groups_.size()) - 1 > pending) {
    oldest = std::move(groups_.front());
    groups_.pop_front();
  }
  return oldest;
}

void Started::clear() {
  if (count_ == 0 && groups_.size() == 1) return;
  groups_.assign(1, {});
  count_ = 0;
}

bool Started::has_any() const {
  return std::any_of(groups_.begin(), groups_.end(), [](const Group& group) { return !group.empty(); });
}

void start(Unit unit, std::function<void()> operation) {
  const auto kept = [&] {
    const InSimulator scope;
    Started& started = Block::current().started(unit);
    if (!started.keeps_next(unit)) return false;
    started.add(std::move(operation));
    return true;
  }();
  if (kept) return;
  // Products are done in their order: each adds to what those before it have left.
  if (unit == Unit::products) {
    commit(unit);
    wait(unit, 0);
  }
  operation();
}

void commit(Unit unit) {
  const InSimulator scope;
  Block::current().started(unit).commit();
}

void wait(Unit unit, int pending) {
  const auto take = [&] {
    const InSimulator scope;
    return Block::current().started(unit).take(pending);
  };
  for (Started::Group group = take(); !group.empty(); group = take()) {
    for (const auto& operation : group) operation();
  }
}

}  // namespace bnb::simulator
