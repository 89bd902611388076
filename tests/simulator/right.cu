// Kernels without a fault, one for each thing that the simulator offers.
#include <cmath>

#include "harness.h"
#include "settings.h"

namespace {

constexpr int kThreads = 256;

__global__ void sum_block(const float* x, float* out, int n) {
  __shared__ float partial[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = thread + static_cast<int>(blockIdx.x) * kThreads; i < n;
       i += kThreads * static_cast<int>(gridDim.x))
    sum += x[i];
  partial[thread] = sum;
  __syncthreads();
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    if (thread < distance) partial[thread] += partial[thread + distance];
    __syncthreads();
  }
  if (thread == 0) atomicAdd(out, partial[0]);
}

void static_shared_memory_and_barriers() {
  const Memory<float> x(10000, 1.0f), out(1, 0.0f);
  LAUNCH(sum_block, 7, kThreads, 0, x.data(), out.data(), static_cast<int>(x.size()));
  REQUIRE(out[0] == 10000.0f);
}

__global__ void reverse(int* x) {
  auto* shared = static_cast<int*>(bnb::simulated_dynamic_shared());
  const unsigned thread = threadIdx.x, last = blockDim.x - 1;
  shared[thread] = x[thread];
  __syncthreads();
  x[thread] = shared[last - thread];
}

void dynamic_shared_memory() {
  const Memory<int> x(100);
  for (int i = 0; i < 100; ++i) x[i] = i;
  LAUNCH(reverse, 1, 100, 400, x.data());
  for (int i = 0; i < 100; ++i) REQUIRE(x[i] == 99 - i);
}

__global__ void indices(int* seen) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&seen[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

void every_thread_of_every_block_runs_once() {
  const dim3 grid(3, 4, 2), block(5, 3, 7);
  const Memory<int> seen(3 * 4 * 2 * 5 * 3 * 7, 0);
  LAUNCH(indices, grid, block, 0, seen.data());
  for (size_t i = 0; i < seen.size(); ++i) REQUIRE(seen[i] == 1);
}

__global__ void shuffle_all(int* out, int width) {
  const auto full = ~0ull;
  const int lane = static_cast<int>(threadIdx.x) % warpSize, value = lane * 10;
  int* mine = out + threadIdx.x * 4;
  mine[0] = __shfl_sync(full, value, 3, width);
  mine[1] = __shfl_up_sync(full, value, 2, width);
  mine[2] = __shfl_down_sync(full, value, 2, width);
  mine[3] = __shfl_xor_sync(full, value, 1, width);
}

// The same without masks, as HIP writes it.
__global__ void shuffle_all_of_hip(int* out, int width) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize, value = lane * 10;
  int* mine = out + threadIdx.x * 4;
  mine[0] = __shfl(value, 3, width);
  mine[1] = __shfl_up(value, 2, width);
  mine[2] = __shfl_down(value, 2, width);
  mine[3] = __shfl_xor(value, 1, width);
}

void shuffles_of_every_width() {
  for (const bool hip : {false, true}) {
    for (int width = 4; width <= warpSize; width *= 2) {
      const Memory<int> out(4 * 128, -1);
      if (hip) {
        LAUNCH(shuffle_all_of_hip, 1, 128, 0, out.data(), width);
      } else {
        LAUNCH(shuffle_all, 1, 128, 0, out.data(), width);
      }
      for (int i = 0; i < 128; ++i) {
        const int lane = i % warpSize, first = lane / width * width, last = first + width - 1;
        REQUIRE(out[i * 4] == 10 * (first + 3));
        REQUIRE(out[i * 4 + 1] == 10 * (lane - 2 < first ? lane : lane - 2));
        REQUIRE(out[i * 4 + 2] == 10 * (lane + 2 > last ? lane : lane + 2));
        REQUIRE(out[i * 4 + 3] == 10 * (lane ^ 1));
      }
    }
  }
}

template <class T>
__global__ void rotate(T* x) {
  x[threadIdx.x] = __shfl(x[threadIdx.x], static_cast<int>(threadIdx.x) + 1);
}

template <class T>
void rotate_values_of() {
  const Memory<T> x(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<T>(static_cast<float>(i));
  LAUNCH(rotate<T>, 1, 64, 0, x.data());
  for (int i = 0; i < 64; ++i) {
    const int source = i / warpSize * warpSize + (i + 1) % warpSize;
    REQUIRE(static_cast<float>(x[i]) == static_cast<float>(source));
  }
}

void shuffles_of_every_type() {
  rotate_values_of<float>();
  rotate_values_of<double>();
  rotate_values_of<long long>();
  rotate_values_of<__half>();
  rotate_values_of<__nv_bfloat16>();
}

__global__ void vote(unsigned long long* votes, int* others) {
  const auto full = ~0ull;
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const auto ballot = __ballot_sync(full, lane % 3 == 0);
  if (lane == 0) votes[threadIdx.x / static_cast<unsigned>(warpSize)] = ballot;
  const bool right = __any_sync(full, lane == 5) && !__any_sync(full, lane == 70) &&
                     __all_sync(full, lane >= 0) && !__all_sync(full, lane != 5) &&
                     __ballot(lane % 3 == 0) == ballot && __any(lane == 5) && !__all(lane == 5);
  others[threadIdx.x] = right;
}

void votes() {
  const Memory<unsigned long long> ballots(4);
  const Memory<int> others(128);
  LAUNCH(vote, 1, 128, 0, ballots.data(), others.data());
  unsigned long long expected = 0;
  for (int lane = 0; lane < warpSize; lane += 3) expected |= 1ull << lane;
  for (int warp = 0; warp < 128 / warpSize; ++warp) REQUIRE(ballots[warp] == expected);
  for (int i = 0; i < 128; ++i) REQUIRE(others[i]);
}

__global__ void vote_as_a_block(int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  out[thread] = __syncthreads_count(thread % 5 == 0);
  out[thread] += 1000 * __syncthreads_or(thread == 77);
  out[thread] += 10000 * __syncthreads_and(thread != 77);
}

void votes_of_a_block() {
  const Memory<int> out(100);
  LAUNCH(vote_as_a_block, 1, 100, 0, out.data());
  for (int i = 0; i < 100; ++i) REQUIRE(out[i] == 1020);
}

// Threads beyond n leave before the vote, as they may; lanes that are gone count as absent.
__global__ void leave_early(unsigned long long* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  const auto ballot = __ballot_sync(~0ull, 1);
  const int other = __shfl_xor_sync(~0ull, 7, 1);
  __syncwarp();
  out[threadIdx.x] = ballot + static_cast<unsigned>(other);
}

void lanes_that_have_returned_are_not_waited_for() {
  const Memory<unsigned long long> out(10);
  LAUNCH(leave_early, 1, 64, 0, out.data(), 10);
  for (int i = 0; i < 10; ++i) REQUIRE(out[i] == 1023 + 7);
}

// Two halves of a warp, each with a mask of its own.
__global__ void halves(int* out) {
  const int half = warpSize / 2, lane = static_cast<int>(threadIdx.x);
  const auto lower = (1ull << half) - 1;
  int value = lane;
  if (lane < half) {
    for (int distance = half / 2; distance; distance /= 2) value += __shfl_xor_sync(lower, value, distance);
  } else {
    value = __shfl_sync(~lower, value, half);
  }
  out[lane] = value;
}

void masks_of_part_of_a_warp() {
  const Memory<int> out(64);
  LAUNCH(halves, 1, warpSize, 0, out.data());
  const int half = warpSize / 2;
  for (int i = 0; i < warpSize; ++i) REQUIRE(out[i] == (i < half ? half * (half - 1) / 2 : half));
}

// Eight lanes at a time exchange through shared memory; the groups of a warp are not in step.
__global__ void exchange_in_groups(int* out) {
  __shared__ int shared[64];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warpSize;
  const auto group = 0xffull << (lane / 8 * 8);
  int sum = 0;
  for (int step = 0; step < 4 + lane / 8; ++step) {
    shared[thread] = thread + step;
    __syncwarp(group);
    sum += shared[thread ^ 1] - step;
    __syncwarp(group);
  }
  out[thread] = sum;
}

void warps_synchronized_in_parts() {
  const Memory<int> out(64);
  LAUNCH(exchange_in_groups, 1, 64, 0, out.data());
  for (int i = 0; i < 64; ++i) REQUIRE(out[i] == (i ^ 1) * (4 + i % warpSize / 8));
}

__global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d) {
  const int thread = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  const auto number = static_cast<unsigned>(thread);
  atomicAdd(&i[0], thread);
  atomicSub(&i[1], 1);
  atomicMin(&i[2], -thread);
  atomicMax(&i[3], thread);
  atomicOr(&u[0], 1u << number % 32);
  atomicAnd(&u[1], ~(1u << number % 32));
  atomicXor(&u[2], number);
  atomicMax(&u[3], number);
  atomicAdd(&l[0], 1ull << 32);
  atomicAdd(f, 1.0f);
  atomicAdd(d, 0.5);
  if (atomicCAS(&i[4], 0, thread + 1) == 0) atomicExch(&i[5], thread + 1);
}

void atomic_operations() {
  const Memory<int> i(6, 0);
  const Memory<unsigned> u(4, 0u);
  const Memory<unsigned long long> l(1, 0ull);
  const Memory<float> f(1, 0.0f);
  const Memory<double> d(1, 0.0);
  u[1] = ~0u;
  LAUNCH(atomics, 4, 256, 0, i.data(), u.data(), l.data(), f.data(), d.data());
  REQUIRE(i[0] == 1023 * 512 && i[1] == -1024 && i[2] == -1023 && i[3] == 1023);
  REQUIRE(u[0] == ~0u && u[1] == 0 && u[2] == 0 && u[3] == 1023);
  REQUIRE(l[0] == 1024ull << 32 && f[0] == 1024.0f && d[0] == 512.0);
  REQUIRE(i[4] != 0 && i[4] == i[5]);
}

// The last block to finish adds up what all of them left.
__global__ void last_block_sums(int* partial, unsigned* finished, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<int>(blockIdx.x);
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  *out = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *out += partial[i];
}

void fences_between_blocks() {
  const Memory<int> partial(50), out(1);
  const Memory<unsigned> finished(1, 0u);
  LAUNCH(last_block_sums, 50, 32, 0, partial.data(), finished.data(), out.data());
  REQUIRE(out[0] == 49 * 25);
}

__global__ void do_nothing(int*) {}

cudaError_t error_of(dim3 grid, dim3 block, size_t shared_bytes) {
  bnb::simulate("do_nothing", do_nothing, grid, block, shared_bytes, nullptr, nullptr);
  const cudaError_t error = cudaPeekAtLastError();
  REQUIRE(cudaGetLastError() == error && cudaGetLastError() == cudaSuccess);
  return error;
}

void launches_that_a_device_refuses() {
  REQUIRE(error_of(1, 1024, 0) == cudaSuccess);
  REQUIRE(error_of(1, 1025, 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(1, dim3(32, 33), 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(1, dim3(1, 1, 65), 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(0, 32, 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(1, 0, 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(dim3(1, 65536), 32, 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(dim3(1, 1, 65536), 32, 0) == cudaErrorInvalidConfiguration);
  REQUIRE(error_of(1, 32, 48 * 1024) == cudaSuccess);
  REQUIRE(error_of(1, 32, 48 * 1024 + 1) == cudaErrorInvalidValue);
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  REQUIRE(cudaFuncSetAttribute(do_nothing, limit, 227 * 1024 + 1) == cudaErrorInvalidValue);
  REQUIRE(cudaGetLastError() == cudaErrorInvalidValue);
  REQUIRE(cudaFuncSetAttribute(do_nothing, limit, 227 * 1024) == cudaSuccess);
  REQUIRE(error_of(1, 32, 227 * 1024) == cudaSuccess);
  REQUIRE(error_of(1, 32, 227 * 1024 + 1) == cudaErrorInvalidValue);
}

__global__ void copy(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }

void fresh_memory_is_not_a_number() {
  const Memory<float> from(32), to(32, 0.0f);
  LAUNCH(copy, 1, 32, 0, from.data(), to.data());
  for (int i = 0; i < 32; ++i) REQUIRE(std::isnan(to[i]));
}

void memory_pools() {
  cudaMemPoolProps properties{};
  cudaMemPool_t pool = nullptr;
  REQUIRE(cudaMemPoolCreate(&pool, &properties) == cudaErrorInvalidValue);
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location = {cudaMemLocationTypeDevice, 0};
  REQUIRE(cudaMemPoolCreate(&pool, &properties) == cudaSuccess);
  unsigned long long threshold = ~0ull, kept = 0;
  REQUIRE(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold) == cudaSuccess);
  REQUIRE(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept) == cudaSuccess);
  REQUIRE(kept == threshold);
  void* data = nullptr;
  REQUIRE(cudaMallocFromPoolAsync(&data, 100, pool, nullptr) == cudaSuccess && data);
  REQUIRE(cudaMemPoolDestroy(pool) == cudaErrorInvalidValue);
  REQUIRE(cudaFreeAsync(data, nullptr) == cudaSuccess);
  REQUIRE(cudaMemPoolDestroy(pool) == cudaSuccess);
  REQUIRE(cudaFree(&pool) == cudaErrorInvalidValue);
  cudaGetLastError();
}

void captures() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  void* data = nullptr;
  bnb::simulator::set_capturing(true);
  REQUIRE(cudaStreamIsCapturing(nullptr, &status) == cudaSuccess && status == cudaStreamCaptureStatusActive);
  REQUIRE(cudaStreamSynchronize(nullptr) == cudaErrorStreamCaptureUnsupported);
  REQUIRE(cudaMemcpy(&data, &data, sizeof(data), cudaMemcpyDefault) == cudaErrorStreamCaptureUnsupported);
  REQUIRE(cudaMalloc(&data, 100) == cudaErrorStreamCaptureUnsupported);
  REQUIRE(error_of(1, 32, 0) == cudaErrorStreamCaptureUnsupported);  // the earlier calls' error, kept
  auto mode = cudaStreamCaptureModeRelaxed;
  REQUIRE(cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess && mode == cudaStreamCaptureModeGlobal);
  REQUIRE(cudaMalloc(&data, 100) == cudaSuccess);
  REQUIRE(cudaStreamSynchronize(nullptr) == cudaErrorStreamCaptureUnsupported);
  REQUIRE(cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess && mode == cudaStreamCaptureModeRelaxed);
  bnb::simulator::set_capturing(false);
  REQUIRE(cudaGetLastError() == cudaErrorStreamCaptureUnsupported);
  REQUIRE(cudaFree(data) == cudaSuccess && cudaStreamSynchronize(nullptr) == cudaSuccess);
}

}  // namespace

const Cases kRight{
    CASE(captures),
    CASE(static_shared_memory_and_barriers),
    CASE(dynamic_shared_memory),
    CASE(every_thread_of_every_block_runs_once),
    CASE(shuffles_of_every_width),
    CASE(shuffles_of_every_type),
    CASE(votes),
    CASE(votes_of_a_block),
    CASE(lanes_that_have_returned_are_not_waited_for),
    CASE(masks_of_part_of_a_warp),
    CASE(warps_synchronized_in_parts),
    CASE(atomic_operations),
    CASE(fences_between_blocks),
    CASE(launches_that_a_device_refuses),
    CASE(fresh_memory_is_not_a_number),
    CASE(memory_pools),
};
