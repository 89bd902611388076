// Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5).
//
// A warp takes a block of 256 entries, reads its gradient, parameter and state once and writes them once. What an
// optimizer computes stands in csrc_shared/optimizer_rules.h.
#include "grid.h"
#include "operations.h"
#include "optimizer_state.h"
#include "workspace.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct ScalarMath {
  static __device__ float sqrt(float x) { return sqrtf(x); }
};

// The entries of a block that this thread owns, moved one step ahead. An entry that is left alone has an update of
// zero and keeps its state.
template <OptimizerName name, int run, class T, class State>
struct Step {
  float values[kOwned], updates[kOwned];
  bool ignored[kOwned];
  OwnedState state;

  __device__ Step(const Coefficients& c, float size, const T* g, const T* p, const State& source,
                  const typename State::template Tables<name>& tables, int64_t block, int64_t valid) {
    T gradients[kOwned], parameters[kOwned];
    load_owned<run>(g + block * kOptimizerBlock, valid, gradients);
    load_owned<run>(p + block * kOptimizerBlock, valid, parameters);
    source.template load<name, run>(tables, block, valid, state);
#pragma unroll
    for (int i = 0; i < kOwned; i++) {
      const float gradient = c.gnorm_scale * to_float(gradients[i]);
      values[i] = to_float(parameters[i]);
      ignored[i] = gradient == c.ignored_gradient;
      float after[kStates];
#pragma unroll
      for (int s = 0; s < kStates; s++) after[s] = uses_state(name, s) ? state[s][i] : 0.0f;
      updates[i] = advance<name, ScalarMath>(c, size, gradient, values[i], after);
#pragma unroll
      for (int s = 0; s < kStates; s++) {
        if (uses_state(name, s) && !ignored[i]) state[s][i] = after[s];
      }
    }
  }
};

// `bounded_size` holds the size of the update where a norm bounds it, and is null otherwise.
template <OptimizerName name, class T, class State>
__global__ void __launch_bounds__(kThreads)
    update_kernel(Coefficients c, float size, const float* bounded_size, const T* g, T* p, int64_t n, State state) {
  constexpr int run = State::template run<T>;
  __shared__ typename State::template Tables<name> tables;
  tables.prepare(state);
  __syncthreads();
  if (bounded_size) size = *bounded_size;
  const int64_t blocks = ceil_div(n, kOptimizerBlock);
  for (int64_t b = int64_t{blockIdx.x} * kWarps + warp(); b < blocks; b += int64_t{gridDim.x} * kWarps) {
    const int64_t valid = n - b * kOptimizerBlock;
    Step<name, run, T, State> step(c, size, g, p, state, tables, b, valid);
    T results[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; i++) {
      const float decayed = couples_decay(name) ? step.values[i] : step.values[i] * c.decay;
      results[i] = from_float<T>(step.ignored[i] ? step.values[i] : decayed - step.updates[i]);
    }
    store_owned<run>(p + b * kOptimizerBlock, valid, results);
    state.template store<name, run>(tables, b, valid, step.state);
  }
}

// --- norms ---

// Sums are taken in an order that depends on nothing but n: first over parts of that many blocks, then of parts.
constexpr int64_t kPartBlocks = 64;

__device__ inline double finite_square(float x) {
  const double value = magnitude_bits(x) < kInfinity ? x : 0.0f;
  return value * value;
}

// The sums of two values over a block of threads, in its first thread; called by all of them.
__device__ void sum_pair_over_threads(double (&sums)[2]) {
  __shared__ double of_warps[2][kWarps];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const double sum = warp_sum(sums[k]);
    if (lane() == 0) of_warps[k][warp()] = sum;
  }
  __syncthreads();
  sums[0] = sums[1] = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; w++) {
      for (int k = 0; k < 2; k++) sums[k] += of_warps[k][w];
    }
  }
  __syncthreads();
}

// partial f64[parts, 2] receives |p|^2 and |update|^2 of each part, the update before the learning rate.
template <OptimizerName name, class T, class State>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(Coefficients c, const T* g, const T* p, int64_t n, State state, double* partial) {
  constexpr int run = State::template run<T>;
  __shared__ typename State::template Tables<name> tables;
  tables.prepare(state);
  __syncthreads();
  const int64_t blocks = ceil_div(n, kOptimizerBlock);
  for (int64_t first = blockIdx.x * kPartBlocks; first < blocks; first += gridDim.x * kPartBlocks) {
    double sums[2] = {};
    for (int64_t b = first + warp(); b < first + kPartBlocks && b < blocks; b += kWarps) {
      const int64_t valid = n - b * kOptimizerBlock;
      const Step<name, run, T, State> step(c, c.unit, g, p, state, tables, b, valid);
#pragma unroll
      for (int i = 0; i < kOwned; i++) {
        if (owned_index<run>(i) >= valid) continue;
        sums[0] += finite_square(step.values[i]);
        if (!step.ignored[i]) sums[1] += finite_square(step.updates[i]);
      }
    }
    sum_pair_over_threads(sums);
    if (threadIdx.x == 0) {
      for (int k = 0; k < 2; k++) partial[first / kPartBlocks * 2 + k] = sums[k];
    }
  }
}

// norms f64[2] from the partial ones, and the size of the update that they allow.
__global__ void __launch_bounds__(kThreads)
    bound_kernel(const double* partial, int64_t parts, double max_unorm, double lr, float unit, double* norms,
                 float* size) {
  double sums[2] = {};
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
    for (int k = 0; k < 2; k++) sums[k] += partial[i * 2 + k];
  }
  sum_pair_over_threads(sums);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 2; k++) norms[k] = sums[k];
  *size = step_size(lr, trust_ratio(max_unorm, sums), unit);
}

template <class State>
void optimizer_update(const char* name, const OptimizerStep& step, const void* g, void* p, DType dtype,
                      const State& state, int64_t n, double* norms, Stream stream) {
  if (n == 0) return;
  const Coefficients c(step);
  const float size = step_size(step.lr, 1.0f, c.unit);
  const int64_t parts = ceil_div(n, kPartBlocks * kOptimizerBlock);
  const bool bounded = step.max_unorm > 0;
  const Workspace workspace(bounded ? 2 * parts * sizeof(double) + sizeof(float) : 0, stream);
  double* const partial = workspace.as<double>();
  float* const bounded_size = bounded ? reinterpret_cast<float*>(partial + 2 * parts) : nullptr;
  const int64_t grid = resident_grid(ceil_div(n, kWarps * kOptimizerBlock), kThreads);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const gradient = static_cast<const T*>(g);
    T* const parameter = static_cast<T*>(p);
    with_rule(step.name, [&](auto rule) {
      constexpr OptimizerName rule_name = decltype(rule)::name;
      if constexpr (takes_max_unorm(rule_name)) {
        if (bounded) {
          launch(name, measure_kernel<rule_name, T, State>, resident_grid(parts, kThreads), kThreads, stream, 0, c,
                 gradient, parameter, n, state, partial);
          launch(name, bound_kernel, 1, kThreads, stream, 0, partial, parts, step.max_unorm, step.lr, c.unit, norms,
                 bounded_size);
        }
      }
      launch(name, update_kernel<rule_name, T, State>, grid, kThreads, stream, 0, c, size, bounded_size, gradient,
             parameter, n, state);
    });
  });
}

}  // namespace

void gpu::optimizer_update_32bit(const OptimizerStep& step, const void* g, void* p, DType dtype, float* state1,
                                 float* state2, int64_t n, double* norms, Stream stream) {
  const FloatState state{{state1, state1 + n, state2}};
  optimizer_update("optimizer_update_32bit", step, g, p, dtype, state, n, norms, stream);
}

void gpu::optimizer_update_8bit_blockwise(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                          uint8_t* state1, uint8_t* state2, const float* qmap1, const float* qmap2,
                                          float* absmax1, float* absmax2, int64_t n, double* norms, Stream stream) {
  const ByteState state{
      {state1, state1 + n, state2}, {absmax1, absmax1 + ceil_div(n, kOptimizerBlock), absmax2}, {qmap1, qmap2}};
  optimizer_update("optimizer_update_8bit_blockwise", step, g, p, dtype, state, n, norms, stream);
}

}  // namespace bnb
