// What a thread starts and a device does beside it: it may happen at once, or as late as it is waited for.
#pragma once

#include <functional>

#include "threads.h"

namespace bnb::simulator {

// What does it: operations of the two are waited for apart.
enum class Unit { copies, products };

// Starts an operation of the running thread; the order of the simulation says when it happens. Lanes that
// start the same operations agree.
void start(Unit unit, std::function<void()> operation);

// Makes a group of those that were started since the last one.
void commit(Unit unit);

// Waits for all groups but the last `pending`.
void wait(Unit unit, int pending);

}  // namespace bnb::simulator
