// Kernels with one fault each. The line of the fault ends in a comment that the tests search for.
#include <cmath>

#include "harness.h"

namespace {

constexpr int kThreads = 64;

__global__ void add_neighbour_unsynchronized(const int* x, int* out) {
  __shared__ int shared[kThreads];
  const int thread = thread_of_block();
  shared[thread] = x[thread];  // FAULT missing_barrier
  out[thread] = shared[kThreads - 1 - thread];
}

void missing_barrier() {
  const Memory<int> x(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) x[i] = i;
  LAUNCH(add_neighbour_unsynchronized, 1, kThreads, 0, x.data(), out.data());
  for (int i = 0; i < kThreads; ++i) REQUIRE(out[i] == kThreads - 1 - i);
}

// Right only where thread 0 comes first.
__global__ void take_order_for_granted(int* out) {
  __shared__ int first;
  if (threadIdx.x == 0) first = 5;  // FAULT order_taken_for_granted
  out[threadIdx.x] = first;
}

void order_taken_for_granted() {
  const Memory<int> out(kThreads);
  LAUNCH(take_order_for_granted, 1, kThreads, 0, out.data());
  for (int i = 0; i < kThreads; ++i) REQUIRE(out[i] == 5);
}

__global__ void read_static_unwritten(float* out) {
  __shared__ float shared[kThreads];
  if (threadIdx.x > 0) shared[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x];
}

void require_no_nan(const Memory<float>& out) {
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(!std::isnan(out[i]));
}

// In every block, also when an earlier one has left its values there.
void static_shared_memory_read_before_written() {
  const Memory<float> out(5 * kThreads);
  for (int launch = 0; launch < 2; ++launch) {
    LAUNCH(read_static_unwritten, 5, kThreads, 0, out.data());
  }
  require_no_nan(out);
}

__global__ void read_dynamic_unwritten(float* out) {
  out[threadIdx.x] = static_cast<float*>(bnb::simulated_dynamic_shared())[threadIdx.x];
}

void dynamic_shared_memory_read_before_written() {
  const Memory<float> out(kThreads);
  LAUNCH(read_dynamic_unwritten, 1, kThreads, kThreads * sizeof(float), out.data());
  require_no_nan(out);
}

__global__ void write(int* x, int index) {
  x[index + thread_of_block()] = 1;  // FAULT device_memory_out_of_bounds
}

void device_memory_out_of_bounds() {
  const Memory<int> x(kThreads);
  LAUNCH(write, 1, kThreads, 0, x.data(), 1);
}

__global__ void write_static_shared(int* x, int index) {
  __shared__ int shared[kThreads];
  shared[index + thread_of_block()] = 1;  // FAULT static_shared_memory_out_of_bounds
  __syncthreads();
  x[threadIdx.x] = shared[threadIdx.x];
}

void static_shared_memory_out_of_bounds() {
  const Memory<int> x(kThreads);
  LAUNCH(write_static_shared, 1, kThreads, 0, x.data(), 1);
}

__global__ void write_dynamic_shared(int index) {
  auto* shared = static_cast<int*>(bnb::simulated_dynamic_shared());
  shared[index + thread_of_block()] = 1;  // FAULT dynamic_shared_memory_out_of_bounds
}

void dynamic_shared_memory_out_of_bounds() {
  LAUNCH(write_dynamic_shared, 1, kThreads, kThreads * sizeof(int), 1);
}

__global__ void skip_barrier(int* x) {
  if (threadIdx.x == 5) return;
  __syncthreads();  // FAULT thread_missing_at_a_barrier
  x[threadIdx.x] = 1;
}

void thread_missing_at_a_barrier() {
  const Memory<int> x(kThreads);
  LAUNCH(skip_barrier, 3, kThreads, 0, x.data());
}

__global__ void wait_at_two_barriers(int*) {
  if (threadIdx.x < 40)
    __syncthreads();  // FAULT different_barriers
  else
    __syncthreads();
}

void different_barriers() { LAUNCH(wait_at_two_barriers, 1, kThreads, 0, nullptr); }

__global__ void shuffle_in_branches(int* x) {
  const int lane = thread_of_block() % warpSize;
  int value = lane;
  if (lane % 2)
    value = __shfl_xor_sync(~0ull, value, 1);  // FAULT lanes_at_different_shuffles
  else
    value = __shfl_xor_sync(~0ull, value, 2);
  x[threadIdx.x] = value;
}

void lanes_at_different_shuffles() {
  const Memory<int> x(kThreads);
  LAUNCH(shuffle_in_branches, 1, kThreads, 0, x.data());
}

__global__ void shuffle_and_wait(int* x) {
  if (threadIdx.x == 7) __syncthreads();
  x[threadIdx.x] = __shfl_xor(thread_of_block(), 1);  // FAULT shuffle_while_a_lane_is_at_a_barrier
}

void shuffle_while_a_lane_is_at_a_barrier() {
  const Memory<int> x(kThreads);
  LAUNCH(shuffle_and_wait, 1, kThreads, 0, x.data());
}

__global__ void shuffle_from_returned(int* x) {
  const int lane = thread_of_block() % warpSize;
  if (lane == 3) return;
  x[threadIdx.x] = __shfl_sync(~0ull, lane, 3);  // FAULT shuffle_from_a_lane_that_has_returned
}

void shuffle_from_a_lane_that_has_returned() {
  const Memory<int> x(kThreads);
  LAUNCH(shuffle_from_returned, 1, kThreads, 0, x.data());
}

__global__ void shuffle_from_outside(int* x) {
  const int lane = thread_of_block() % warpSize;
  if (lane < 4) x[threadIdx.x] = __shfl_sync(0xfull, lane, 9);  // FAULT shuffle_from_a_lane_outside_the_mask
}

void shuffle_from_a_lane_outside_the_mask() {
  const Memory<int> x(kThreads);
  LAUNCH(shuffle_from_outside, 1, kThreads, 0, x.data());
}

__global__ void vote_with_two_masks(int* x) {
  const int lane = thread_of_block() % warpSize;
  const auto mask = lane == 0 ? 0xffffull : ~0ull;
  x[threadIdx.x] = __any_sync(mask, 1);  // FAULT different_masks
}

void different_masks() {
  const Memory<int> x(kThreads);
  LAUNCH(vote_with_two_masks, 1, kThreads, 0, x.data());
}

__global__ void vote_from_outside(int* x) {
  x[threadIdx.x] = __any_sync(0xfull, 1);  // FAULT lane_outside_its_own_mask
}

void lane_outside_its_own_mask() {
  const Memory<int> x(kThreads);
  LAUNCH(vote_from_outside, 1, kThreads, 0, x.data());
}

__global__ void shuffle_32(int* x) {
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1, 32);  // FAULT mask_of_32_bits
}

// Right where the warp has 32 lanes.
void mask_of_32_bits() {
  const Memory<int> x(kThreads);
  LAUNCH(shuffle_32, 1, kThreads, 0, x.data());
}

__global__ void write_everywhere(int* x) {
  x[threadIdx.x] = thread_of_block();  // FAULT race_between_blocks
}

void race_between_blocks() {
  const Memory<int> x(kThreads);
  LAUNCH(write_everywhere, 2, kThreads, 0, x.data());
}

__global__ void write_at_once(int* x) {
  *x = thread_of_block();  // FAULT race_in_a_block
}

void race_in_a_block() {
  const Memory<int> x(1);
  LAUNCH(write_at_once, 1, kThreads, 0, x.data());
}

// Before a shuffle orders them, lanes of a warp race as any threads do; between warps it orders nothing.
__global__ void exchange_between_warps(int* x, int* out) {
  const int thread = thread_of_block();
  x[thread] = __shfl_xor(thread, 1);  // FAULT race_between_warps
  __syncwarp();
  out[thread] = x[(thread + warpSize) % static_cast<int>(blockDim.x)];
}

void race_between_warps() {
  const Memory<int> x(128), out(128);
  LAUNCH(exchange_between_warps, 1, 128, 0, x.data(), out.data());
}

__global__ void stop(int*) {
  if (threadIdx.x == 9) __trap();  // FAULT trap
}

void trap() { LAUNCH(stop, 2, kThreads, 0, nullptr); }

}  // namespace

const Cases kFaults{
    CASE(missing_barrier),
    CASE(order_taken_for_granted),
    CASE(static_shared_memory_read_before_written),
    CASE(dynamic_shared_memory_read_before_written),
    CASE(device_memory_out_of_bounds),
    CASE(static_shared_memory_out_of_bounds),
    CASE(dynamic_shared_memory_out_of_bounds),
    CASE(thread_missing_at_a_barrier),
    CASE(different_barriers),
    CASE(lanes_at_different_shuffles),
    CASE(shuffle_while_a_lane_is_at_a_barrier),
    CASE(shuffle_from_a_lane_that_has_returned),
    CASE(shuffle_from_a_lane_outside_the_mask),
    CASE(different_masks),
    CASE(lane_outside_its_own_mask),
    CASE(mask_of_32_bits),
    CASE(race_between_blocks),
    CASE(race_in_a_block),
    CASE(race_between_warps),
    CASE(trap),
};
