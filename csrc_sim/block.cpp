#include "block.h"

#include <algorithm>
#include <exception>

#include "sanitizers.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace bnb::simulator {
namespace {

__thread Block* current_block = nullptr;

char fence_order = 0;

// Unwinds a thread of a block that has a fault.
struct Abandoned {};

uint3 index_in(uint64_t rank, const dim3& size) {
  return {static_cast<unsigned>(rank % size.x), static_cast<unsigned>(rank / size.x % size.y),
          static_cast<unsigned>(rank / size.x / size.y)};
}

}  // namespace

Block::Block() = default;

Block& Block::current() { return *current_block; }

void Block::prepare(const Launch& launch) {
  launch_ = launch;
  warp_size_ = warp_size();
  shared_.prepare(launch.kernel, launch.shared_bytes);
  const auto count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  threads_.resize(static_cast<size_t>(count));
  for (int rank = 0; rank < count; ++rank) {
    threads_[rank].rank = rank;
    threads_[rank].index = index_in(static_cast<uint64_t>(rank), launch.block);
  }
  warps_.resize(static_cast<size_t>((count + warp_size_ - 1) / warp_size_));
  // A fiber that a thread creates would be ordered after it.
  while (kThreadSanitizer && fibers_.size() < threads_.size()) new_fiber();
}

void Block::begin(uint64_t index) {
  shared_.fill();
  current_block = this;
  block_index_ = index_in(index, launch_.grid);
  blockIdx = block_index_;
  blockDim = launch_.block;
  gridDim = launch_.grid;
  turns_ = Turns(index);
  const auto count = static_cast<int>(threads_.size());
  released_.clear();
  for (Thread& thread : threads_) {
    thread.fiber = nullptr;
    for (Started& started : thread.started) started.clear();
    released_.push_back(&thread);
  }
  ready_.clear();
  make_ready(released_);
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
    const int lanes = std::min(warp_size_, count - static_cast<int>(warp) * warp_size_);
    warps_[warp].live = ~uint64_t{0} >> (64 - lanes);
    warps_[warp].waiting = 0;
  }
  live_ = count;
  at_barrier_ = 0;
  fault_.clear();
}

std::string Block::run(uint64_t index) {
  begin(index);
  release(&start_order_);
  while (live_ > 0 && fault_.empty()) {
    if (Thread* next = take_ready()) {
      go_on_with(next, main_);
    } else if (!complete_without_returned()) {
      find_missing_threads();
    }
  }
  if (!fault_.empty()) abandon();
  acquire(&end_order_);
  shared_.look();
  return fault_;
}

void Block::run_threads(void* self) {
  auto& block = *static_cast<Block*>(self);
  for (;;) {
    Thread& thread = *block.running_;
    block.run_thread(thread);
    Fiber& fiber = *thread.fiber;
    thread.fiber = nullptr;
    Thread* next = block.fault_.empty() ? block.take_ready() : nullptr;
    if (next && !next->fiber && !kThreadSanitizer) {
      next->fiber = &fiber;
      block.running_ = next;
      threadIdx = next->index;
      continue;
    }
    if (!kThreadSanitizer) block.idle_.push_back(&fiber);
    block.go_on_with(next, fiber);
  }
}

void Block::run_thread(Thread& thread) {
  acquire(&start_order_);
  leave_simulator();
  try {
    launch_.run_thread(launch_.call);
    enter_simulator();
    for (const Started& started : thread.started)
      if (started.has_any()) find_fault("returns without waiting for what it has started", &thread);
  } catch (const Abandoned&) {
    enter_simulator();
  } catch (const std::exception& error) {
    enter_simulator();
    find_fault(error.what(), &thread);
  }
  release(&end_order_);
  thread.state = Thread::State::returned;
  warps_[thread.rank / warp_size_].live &= ~(uint64_t{1} << thread.rank % warp_size_);
  --live_;
}

Thread* Block::take_ready() { return ready_.empty() ? nullptr : turns_.take(ready_); }

// Leaves the fiber `from` for a thread, or for the block's own loop where none can go on.
void Block::go_on_with(Thread* next, Fiber& from) {
  running_ = next;
  if (!next) return Fiber::switch_over(from, main_);
  if (!next->fiber) next->fiber = &idle_fiber(*next);
  threadIdx = next->index;
  if (next->fiber != &from) Fiber::switch_over(from, *next->fiber);
}

// The running thread lets others go on until it has been made ready and its turn has come.
void Block::wait() {
  Thread& self = *running_;
  go_on_with(fault_.empty() ? take_ready() : nullptr, *self.fiber);
  if (!fault_.empty()) throw Abandoned();
}

// All of them, given in ascending order.
void Block::make_ready(const std::vector<Thread*>& threads) {
  const size_t first = ready_.size();
  ready_.insert(ready_.end(), threads.begin(), threads.end());
  if (turns_.last_first()) std::reverse(ready_.begin() + static_cast<ptrdiff_t>(first), ready_.end());
  for (Thread* thread : threads) thread->state = Thread::State::ready;
}

Fiber& Block::new_fiber() {
  fibers_.push_back(std::make_unique<Fiber>(&Block::run_threads, this));
  return *fibers_.back();
}

// The thread sanitizer takes what one fiber does for ordered: there each thread has its own.
Fiber& Block::idle_fiber(const Thread& thread) {
  if (kThreadSanitizer) return *fibers_[static_cast<size_t>(thread.rank)];
  if (idle_.empty()) return new_fiber();
  Fiber& fiber = *idle_.back();
  idle_.pop_back();
  return fiber;
}

// Ends the threads of a faulty block that wait.
void Block::abandon() {
  for (Thread& thread : threads_)
    if (thread.fiber) go_on_with(&thread, main_);
}

int Block::barrier(const char* name, Site site, bool predicate) {
  Thread& self = *running_;
  self.operation = name;
  self.site = site;
  if (at_barrier_ == 0) {
    first_at_barrier_ = &self;
    predicates_ = 0;
  } else if (!(site == first_at_barrier_->site)) {
    fail("waits at another barrier than others do:" + waiting_threads({first_at_barrier_, &self}));
  }
  self.state = Thread::State::at_barrier;
  predicates_ += predicate;
  char* order = &barrier_order_[barriers_ & 1];
  release(order);
  if (++at_barrier_ == static_cast<int>(threads_.size())) {
    at_barrier_ = 0;
    ++barriers_;
    released_.clear();
    for (Thread& thread : threads_) {
      thread.result = static_cast<uint64_t>(predicates_);
      released_.push_back(&thread);
    }
    make_ready(released_);
  }
  wait();
  acquire(order);
  return static_cast<int>(self.result);
}

void Block::fail(const std::string& message) {
  find_fault(message, running_);
  throw Abandoned();
}

int barrier(const char* name, Site site, bool predicate) {
  const InSimulator scope;
  return Block::current().barrier(name, site, predicate);
}

uint64_t exchange(WarpRequest& request) {
  const InSimulator scope;
  return Block::current().exchange(request);
}

// Fences order what precedes one with what follows a later one; that orders a little more than a device does.
void fence() {
  release(&fence_order);
  acquire(&fence_order);
}

void fail(const char* message, Site site) {
  const InSimulator scope;
  Block::current().fail(std::string(message) + " at " + site.file + ":" + std::to_string(site.line));
}

}  // namespace bnb::simulator

namespace bnb {

void* simulated_dynamic_shared() { return simulator::Block::current().dynamic_shared(); }

}  // namespace bnb
