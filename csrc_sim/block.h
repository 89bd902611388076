// The threads of one block, on fibers of one OS thread.
//
// A thread runs until it must wait; then the next one that can go on does. A fiber whose thread has ended
// runs the next thread that has not started, so that a kernel without barriers and shuffles is a plain loop.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "device/asynchronous.h"
#include "device/launch.h"
#include "device/threads.h"
#include "fiber.h"
#include "settings.h"
#include "shared_memory.h"

namespace bnb::simulator {

struct Thread {
  enum class State { ready, at_barrier, in_warp, returned };

  int rank;  // in the block
  uint3 index;
  State state;
  Fiber* fiber;  // null before it starts and after it has ended
  // Where it waits, and for what.
  const char* operation;
  Site site;
  WarpRequest* request;
  uint64_t result;
  char* order;                     // for the thread sanitizer: of the operation it was in
  std::array<Started, 2> started;  // by Unit
};

// Neighbouring threads that exchange values.
struct Warp {
  uint64_t live;     // lanes that have not returned
  uint64_t waiting;  // lanes in an operation of the warp
  unsigned operations;
  // For the thread sanitizer: what comes before an operation, and what each of the latest ones hands on.
  char arrivals, departures[8];
};

class Block {
 public:
  Block();

  // The one that this OS thread runs.
  static Block& current();

  // Makes ready for the blocks of a launch.
  void prepare(const Launch& launch);
  // Runs one of them; returns what its kernel did wrong, empty for nothing.
  std::string run(uint64_t index);

  // Called by the running thread, on its fiber.
  int barrier(const char* name, Site site, bool predicate);
  uint64_t exchange(WarpRequest& request);
  [[noreturn]] void fail(const std::string& message);
  Started& started(Unit unit) { return running_->started[static_cast<size_t>(unit)]; }
  void* dynamic_shared() const { return shared_.dynamic(); }

 private:
  static void run_threads(void* self);
  void run_thread(Thread& thread);

  // Turns (block.cpp).
  void begin(uint64_t index);
  Thread* take_ready();
  void go_on_with(Thread* next, Fiber& from);
  void wait();
  void make_ready(const std::vector<Thread*>& threads);
  Fiber& new_fiber();
  Fiber& idle_fiber(const Thread& thread);
  void abandon();

  // Operations of a warp (warp.cpp).
  uint64_t participants(const WarpRequest& request, const Warp& warp, int lane) const;
  void check_request(const WarpRequest& request, int lane);
  bool complete(int warp, uint64_t lanes);
  bool complete_without_returned();
  Thread& lane_of(int warp, int lane) { return threads_[warp * warp_size_ + lane]; }

  // What went wrong (report.cpp).
  void find_fault(const std::string& message, const Thread* thread);
  std::string waiting_threads(const std::vector<const Thread*>& threads) const;
  void find_missing_threads();
  std::string place_of(const Thread& thread) const;

  Launch launch_{};
  int warp_size_ = 32;
  uint3 block_index_{};
  SharedMemory shared_;
  Fiber main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Thread*> ready_;  // the next one last
  std::vector<Thread*> released_;
  Turns turns_{0};
  Thread* running_ = nullptr;
  int live_ = 0;
  std::string fault_;

  // The barrier that threads wait at.
  int at_barrier_ = 0;
  int predicates_ = 0;
  unsigned barriers_ = 0;
  Thread* first_at_barrier_ = nullptr;

  // For the thread sanitizer: the block's start and end, and even and odd barriers.
  char start_order_ = 0, end_order_ = 0;
  char barrier_order_[2] = {};
};

}  // namespace bnb::simulator
