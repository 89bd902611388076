// What the lanes of a warp do together.
#include <iterator>
#include <string>

#include "block.h"
#include "sanitizers.h"

namespace bnb::simulator {
namespace {

bool same_operation(const WarpRequest& a, const WarpRequest& b) {
  return a.site == b.site && a.exchange == b.exchange && a.width == b.width && a.bytes == b.bytes;
}

// The lane that a shuffle reads: in the lane's own group of `width`, or the lane itself beyond its ends.
int source_lane(const WarpRequest& request, int lane) {
  const int width = request.width;
  const int first = lane & ~(width - 1);
  const int last = first + width - 1;
  const int operand = request.operand;
  switch (request.exchange) {
    case Exchange::index:
      return first + (operand & (width - 1));
    case Exchange::up:
      return lane - operand < first ? lane : lane - operand;
    case Exchange::down:
      return lane + operand > last ? lane : lane + operand;
    case Exchange::exclusive_or:
      return (lane ^ operand) > last ? lane : lane ^ operand;
    default:
      return lane;
  }
}

}  // namespace

void Block::check_request(const WarpRequest& request, int lane) {
  const auto refuse = [&](const std::string& reason) {
    fail(request.name + (" " + reason) + waiting_threads({running_}));
  };
  if (request.mask_bits && request.mask_bits < warp_size_)
    refuse("has a mask of 32 bits in a warp of " + std::to_string(warp_size_) + " lanes");
  if (request.mask_bits && !(request.mask >> lane & 1))
    refuse("is called by lane " + std::to_string(lane) + ", which is not in its mask");
  const int width = request.width;
  if (request.exchange != Exchange::vote && (width < 1 || width > warp_size_ || (width & (width - 1))))
    refuse("has a width of " + std::to_string(width) + ", not a power of two up to the warp's");
}

// The lanes that must take part: those of the mask, or of the group of `width`, or all; but who has returned.
uint64_t Block::participants(const WarpRequest& request, const Warp& warp, int lane) const {
  if (request.mask_bits) return request.mask & warp.live;
  const int width = request.width ? request.width : warp_size_;
  return (~uint64_t{0} >> (64 - width)) << (lane & ~(width - 1)) & warp.live;
}

uint64_t Block::exchange(WarpRequest& request) {
  Thread& self = *running_;
  const int lane = self.rank % warp_size_;
  const int index = self.rank / warp_size_;
  Warp& warp = warps_[static_cast<size_t>(index)];
  self.operation = request.name;
  self.site = request.site;
  self.request = &request;
  check_request(request, lane);
  self.state = Thread::State::in_warp;
  warp.waiting |= uint64_t{1} << lane;
  release(&warp.arrivals);
  const uint64_t lanes = participants(request, warp, lane);
  if ((lanes & ~warp.waiting) == 0) complete(index, lanes);
  wait();
  acquire(self.order);
  return self.result;
}

// Gives every lane its result, all of them being in the same operation; a fault otherwise.
bool Block::complete(int index, uint64_t lanes) {
  Warp& warp = warps_[static_cast<size_t>(index)];
  Thread& first = lane_of(index, __builtin_ctzll(lanes));
  uint64_t votes = 0;
  released_.clear();
  for (uint64_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctzll(left);
    Thread& thread = lane_of(index, lane);
    const WarpRequest& request = *thread.request;
    if (!same_operation(request, *first.request)) {
      find_fault("lanes of its warp are in different operations" + waiting_threads({&first, &thread}),
                 &thread);
      return false;
    }
    if (participants(request, warp, lane) != lanes) {
      find_fault("lanes of its warp have different masks" + waiting_threads({&thread}), &thread);
      return false;
    }
    votes |= (request.value & 1) << lane;
    released_.push_back(&thread);
  }
  for (Thread* thread : released_) {
    const int lane = thread->rank % warp_size_;
    const int source = source_lane(*thread->request, lane);
    if (thread->request->exchange == Exchange::vote) {
      thread->result = votes;
    } else if (lanes >> source & 1) {
      thread->result = lane_of(index, source).request->value;
    } else {
      const bool returned = !(warp.live >> source & 1);
      find_fault(std::string(thread->request->name) + " of lane " + std::to_string(lane) + " reads lane " +
                     std::to_string(source) + ", which " +
                     (returned ? "has returned" : "does not take part") + waiting_threads({thread}),
                 thread);
      return false;
    }
  }
  char* order = &warp.departures[warp.operations++ % std::size(warp.departures)];
  acquire(&warp.arrivals);
  release(order);
  for (Thread* thread : released_) thread->order = order;
  warp.waiting &= ~lanes;
  make_ready(released_);
  return true;
}

// Once nobody can go on: the operations that wait only for lanes which have returned meanwhile.
bool Block::complete_without_returned() {
  for (int index = 0; index < static_cast<int>(warps_.size()); ++index) {
    Warp& warp = warps_[static_cast<size_t>(index)];
    for (uint64_t left = warp.waiting; left; left &= left - 1) {
      const int lane = __builtin_ctzll(left);
      const uint64_t lanes = participants(*lane_of(index, lane).request, warp, lane);
      if ((lanes & ~warp.waiting) == 0) return complete(index, lanes) || !fault_.empty();
    }
  }
  return false;
}

}  // namespace bnb::simulator
