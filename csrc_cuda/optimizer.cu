// Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5).
//
// A warp takes a block of 256 entries, reads its gradient, parameter and state once and writes them once.
// What an optimizer computes stands in csrc_shared/optimizer_rules.h.
#include <functional>
#include <vector>

#include "grid.h"
#include "operations.h"
#include "optimizer_state.h"
#include "workspace.h"

namespace bnb {
namespace {

constexpr int kThreads = CellEncoder::kThreads;
constexpr int kWarps = kThreads / kWarp;

struct ScalarMath {
  static __device__ float sqrt(float x) { return sqrtf(x); }
};

// A parameter with its gradient and state, and the rule to apply.
//
// It is plain where all blocks are whole and no entry is left alone: code for that carries no trace of the
// rest.
template <OptimizerName rule, class Element, class StateOf, bool is_plain>
struct Parameter {
  using T = Element;
  using State = StateOf;
  using Tables = typename State::template Tables<rule>;
  static constexpr OptimizerName name = rule;
  static constexpr bool plain = is_plain;
  static constexpr int run = State::template run<T>;

  const T* g;
  T* p;
  int64_t n;
  State state;
  bool aligned;

  __device__ int64_t blocks() const { return ceil_div(n, kOptimizerBlock); }

  __device__ Block block(int64_t index) const {
    if (plain) return Block{index, kOptimizerBlock, true};
    const int64_t valid = n - index * kOptimizerBlock;
    return Block{index, valid, aligned && valid >= kOptimizerBlock};
  }
};

// The entries of a block that this thread owns, one step ahead. An entry that is left alone has an update of
// zero.
template <class P>
struct Step {
  float values[kOwned], updates[kOwned], results[kOwned];
  float state[kStates][kOwned];

  __device__ Step(const Coefficients& c, float size, const P& from, const typename P::Tables& tables,
                  const Block& block) {
    float gradients[kOwned];
    load_floats_owned<P::run>(from.g, block, gradients);
    load_floats_owned<P::run>(from.p, block, values);
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      if (uses_state(P::name, s)) from.state.template load<P::run>(s, tables, block, state[s]);
    }
#pragma unroll
    for (int i = 0; i < kOwned; i++) {
      float after[kStates];
#pragma unroll
      for (int s = 0; s < kStates; s++) after[s] = uses_state(P::name, s) ? state[s][i] : 0.0f;
      const float gradient = c.gnorm_scale * gradients[i];
      const float update = advance<P::name, ScalarMath>(c, size, gradient, values[i], after);
      const float decayed = couples_decay(P::name) ? values[i] : values[i] * c.decay;
      const bool is_left = !P::plain && gradient == c.ignored_gradient;
      updates[i] = is_left ? 0.0f : update;
      results[i] = is_left ? values[i] : decayed - update;
#pragma unroll
      for (int s = 0; s < kStates; s++) {
        if (uses_state(P::name, s)) state[s][i] = is_left ? state[s][i] : after[s];
      }
    }
  }

  __device__ void store(const P& to, const typename P::Tables& tables, const Block& block) {
    store_floats_owned<P::run>(to.p, block, results);
#pragma unroll
    for (int s = 0; s < kStates; s++) {
      if (!uses_state(P::name, s)) continue;
      to.state.template store<P::run>(s, tables, block, divides_by(P::name, s), state[s]);
    }
  }
};

// `bounded_size` holds the size of the update where a norm bounds it, and is null otherwise.
template <class P>
__global__ void __launch_bounds__(kThreads)
    update_kernel(Coefficients c, float size, const float* bounded_size, P parameter) {
  __shared__ typename P::Tables tables;
  tables.prepare(parameter.state);
  __syncthreads();
  if (bounded_size) size = *bounded_size;
  const int64_t blocks = parameter.blocks();
  for (int64_t b = int64_t{blockIdx.x} * kWarps + warp(); b < blocks; b += int64_t{gridDim.x} * kWarps) {
    const Block block = parameter.block(b);
    Step<P> step(c, size, parameter, tables, block);
    step.store(parameter, tables, block);
  }
}

// Sums are taken in an order that depends on nothing but n: first over parts of that many blocks, then of
// parts.
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
template <class P>
__global__ void __launch_bounds__(kThreads) measure_kernel(Coefficients c, P parameter, double* partial) {
  __shared__ typename P::Tables tables;
  tables.prepare(parameter.state);
  __syncthreads();
  const int64_t blocks = parameter.blocks();
  for (int64_t first = blockIdx.x * kPartBlocks; first < blocks; first += gridDim.x * kPartBlocks) {
    double sums[2] = {};
    for (int64_t b = first + warp(); b < first + kPartBlocks && b < blocks; b += kWarps) {
      const Block block = parameter.block(b);
      const Step<P> step(c, c.unit, parameter, tables, block);
#pragma unroll
      for (int i = 0; i < kOwned; i++) {
        if (!block.whole && owned_index<P::run>(i) >= block.valid) continue;
        sums[0] += finite_square(step.values[i]);
        sums[1] += finite_square(step.updates[i]);
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

// Where a norm bounds the update: takes it, and returns where its size will be.
template <class P>
const float* measure(const char* name, const OptimizerStep& step, const Coefficients& c, const P& parameter,
                     const Workspace& workspace, int64_t parts, double* norms, Stream stream) {
  double* const partial = workspace.as<double>();
  float* const size = reinterpret_cast<float*>(partial + 2 * parts);
  launch(name, measure_kernel<P>, resident_grid(parts, kThreads), kThreads, stream, 0, c, parameter, partial);
  launch(name, bound_kernel, 1, kThreads, stream, 0, partial, parts, step.max_unorm, step.lr, c.unit, norms,
         size);
  return size;
}

template <class P>
void update(const char* name, const OptimizerStep& step, const Coefficients& c, const P& parameter,
            const float* bounded_size, Stream stream) {
  const int64_t grid = resident_grid(ceil_div(parameter.n, kWarps * kOptimizerBlock), kThreads);
  const float size = step_size(step.lr, 1.0f, c.unit);
  launch(name, update_kernel<P>, grid, kThreads, stream, 0, c, size, bounded_size, parameter);
}

template <class State>
void optimizer_update(const char* name, const OptimizerStep& step, const void* g, void* p, DType dtype,
                      const State& state, int64_t n, double* norms, Stream stream) {
  if (n == 0) return;
  const Coefficients c(step);
  const int64_t parts = ceil_div(n, kPartBlocks * kOptimizerBlock);
  const bool bounded = step.max_unorm > 0;
  const Workspace workspace(bounded ? 2 * parts * sizeof(double) + sizeof(float) : 0, stream);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_rule(step.name, [&](auto rule) {
      constexpr OptimizerName rule_name = decltype(rule)::name;
      using General = Parameter<rule_name, T, State, false>;
      using Plain = Parameter<rule_name, T, State, true>;
      const bool aligned = are_aligned<General::run>(static_cast<const T*>(g), static_cast<const T*>(p)) &&
                           state.template is_aligned<General::run>();
      const General general{static_cast<const T*>(g), static_cast<T*>(p), n, state, aligned};
      const float* bounded_size = nullptr;
      if constexpr (takes_max_unorm(rule_name)) {
        if (bounded) bounded_size = measure(name, step, c, general, workspace, parts, norms, stream);
      }
      if (aligned && n % kOptimizerBlock == 0 && !step.skip_zeros) {
        update(name, step, c, Plain{general.g, general.p, n, state, aligned}, bounded_size, stream);
      } else {
        update(name, step, c, general, bounded_size, stream);
      }
    });
  });
}

}  // namespace

void gpu::optimizer_update_32bit(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                 float* state1, float* state2, int64_t n, double* norms, Stream stream) {
  const FloatState state{{state1, state1 + n, state2}};
  optimizer_update("optimizer_update_32bit", step, g, p, dtype, state, n, norms, stream);
}

void gpu::optimizer_update_8bit_blockwise(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                          uint8_t* state1, uint8_t* state2, const float* qmap1,
                                          const float* qmap2, float* absmax1, float* absmax2, int64_t n,
                                          double* norms, Stream stream) {
  const ByteState state{{state1, state1 + n, state2},
                        {absmax1, absmax1 + ceil_div(n, kOptimizerBlock), absmax2},
                        {qmap1, qmap2}};
  optimizer_update("optimizer_update_8bit_blockwise", step, g, p, dtype, state, n, norms, stream);
}

// Launches follow one another in the stream.
void for_each_tensor(const std::vector<int64_t>& counts, const std::function<void(size_t)>& body) {
  for (size_t i = 0; i < counts.size(); i++) body(i);
}

}  // namespace bnb
