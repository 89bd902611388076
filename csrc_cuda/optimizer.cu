// Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5).
//
// A warp takes a block of 256 entries, reads its gradient, parameter and state once and writes them once.
// What an optimizer computes stands in csrc_shared/optimizer_rules.h.
#include <algorithm>

#include "grid.h"
#include "operations.h"
#include "optimizer_state.h"
#include "quotient.h"
#include "workspace.h"

namespace bnb {
namespace {

constexpr int kThreads = CellWords<true>::kThreads;
constexpr int kWarps = kThreads / kWarp;

// Blocks of threads that a multiprocessor has room for at least: registers for more of them would be spilled.
// AMD's have memory for the tables of two.
#if defined(__HIP_PLATFORM_AMD__)
template <class P>
constexpr int kBlocksAtLeast = 2;
#else
template <class P>
constexpr int kBlocksAtLeast =
    P::plain && P::name == OptimizerName::adam && sizeof(typename P::T) == 2 ? 4 : 2;
#endif

// A parameter with its gradient and state, and the rule to apply.
//
// It is plain where all blocks are whole and no entry is left alone: code for that carries no trace of the
// rest.
template <OptimizerName rule, class Element, class StateOf, bool is_plain>
struct Parameter {
  using T = Element;
  using State = StateOf;
  using Stored = typename State::Stored;
  using Tables = typename State::template Tables<rule>;
  static constexpr OptimizerName name = rule;
  static constexpr bool plain = is_plain;
  static constexpr int run = State::template run<T>;

  const T* g;
  T* p;
  int64_t n;
  State state;
  bool aligned;

  explicit BNB_HOST_DEVICE Parameter(const Stored& stored)
      : g(static_cast<const T*>(stored.g)),
        p(static_cast<T*>(stored.p)),
        n(stored.n),
        state(stored),
        aligned(are_aligned<run>(g, p)) {
    for (int s = 0; s < kStates; s++)
      aligned = aligned && (!uses_state(name, s) || state.template is_aligned<run>(s));
  }

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
    bool is_left[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; i++) {
      float after[kStates];
#pragma unroll
      for (int s = 0; s < kStates; s++) after[s] = uses_state(P::name, s) ? state[s][i] : 0.0f;
      const float gradient = c.gnorm_scale * gradients[i];
      updates[i] = advance_state<P::name>(c, size, gradient, values[i], after);
      is_left[i] = !P::plain && gradient == c.ignored_gradient;
#pragma unroll
      for (int s = 0; s < kStates; s++) {
        if (uses_state(P::name, s)) state[s][i] = is_left[i] ? state[s][i] : after[s];
      }
    }
    if constexpr (has_divisor(P::name)) divide_by_roots(updates, state[divisor_of(P::name)], c.eps);
#pragma unroll
    for (int i = 0; i < kOwned; i++) {
      const float decayed = couples_decay(P::name) ? values[i] : values[i] * c.decay;
      updates[i] = is_left[i] ? 0.0f : updates[i];
      results[i] = is_left[i] ? values[i] : decayed - updates[i];
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

// What is the same for every entry of a parameter, as the host computed it; the size of the update is that
// without a bound.
struct Numbers {
  static constexpr bool in_memory = false;

  Coefficients c;
  double lr;
  float size;

  Numbers() = default;
  explicit BNB_HOST_DEVICE Numbers(const OptimizerStep& s)
      : c(s), lr(s.lr), size(step_size(lr, 1.0f, c.unit)) {}

  float size_at_launch() const { return size; }
  __device__ const Numbers& of(int, Numbers&) const { return *this; }
};

// The same for each parameter of a launch, in the device's memory: of a step whose count or learning rate is
// there.
struct NumbersInMemory {
  static constexpr bool in_memory = true;

  Numbers* all;

  float size_at_launch() const { return 0; }
  // Those of the i-th parameter, for all threads of a block after a barrier.
  __device__ const Numbers& of(int i, Numbers& shared) const {
    if (threadIdx.x == 0) shared = all[i];
    return shared;
  }
};

// The parameters of a launch, as many as its arguments have room for.
template <class Stored>
struct Batch {
  static constexpr size_t kOtherBytes = 256;  // of the launch's other arguments, and to align these
  static constexpr int kMost = (kArgumentBytes - kOtherBytes) / (sizeof(Stored) + sizeof(int));

  Stored parameters[kMost];
  int ends[kMost];  // one past the last block of threads of each
  int count;

  __device__ int begin(int i) const { return i == 0 ? 0 : ends[i - 1]; }

  // The parameter of a block of threads.
  __device__ int of_block(int block) const {
    int first = 0, last = count - 1;
    while (first < last) {
      const int middle = (first + last) / 2;
      if (block < ends[middle]) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    return first;
  }

  // Shares the blocks of threads that the device can hold, by the parameters' sizes; gives their number.
  int64_t share_blocks() {
    const auto tiles = [&](int i) { return ceil_div(parameters[i].n, kWarps * kOptimizerBlock); };
    int64_t all_tiles = 0;
    for (int i = 0; i < count; i++) all_tiles += tiles(i);
    const int64_t blocks = resident_grid(all_tiles, kThreads);
    int end = 0;
    for (int i = 0; i < count; i++) {
      end += static_cast<int>(std::max<int64_t>(1, tiles(i) * blocks / all_tiles));
      ends[i] = end;
    }
    return end;
  }
};

// The counts of the parameters of a launch, in the device's memory; null: the step has the number.
template <int most>
struct Counts {
  const double* of[most];
};

// The numbers of each of them.
template <int most>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(OptimizerStep step, Counts<most> counts, int count, Numbers* all) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    all[i] = Numbers(at_hand(step, counts.of[i]));
}

// The size of the update is `size`, or in memory with the numbers; `bounded_size` holds it where a norm
// bounds it, and is null otherwise. Chosen between here and the numbers, it would lie in scratch memory on
// AMD's GPUs.
template <class P, class Source>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast<P>)
    update_kernel(Source source, float size, const float* bounded_size,
                  typename P::State::Codebooks codebooks, Batch<typename P::Stored> batch) {
  __shared__ typename P::Tables tables;
  __shared__ Numbers shared;
  const int thread_block = static_cast<int>(blockIdx.x), i = batch.of_block(thread_block);
  const Numbers& numbers = source.of(i, shared);
  tables.prepare(codebooks);
  __syncthreads();
  if constexpr (Source::in_memory) size = numbers.size;
  if (bounded_size) size = *bounded_size;
  const int first = batch.begin(i);
  const int64_t warps = int64_t{batch.ends[i] - first} * kWarps;
  const P parameter(batch.parameters[i]);
  const int64_t blocks = parameter.blocks();
  for (int64_t b = int64_t{thread_block - first} * kWarps + warp(); b < blocks; b += warps) {
    const Block block = parameter.block(b);
    Step<P> step(numbers.c, size, parameter, tables, block);
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
template <class P, class Source>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast<P>)
    measure_kernel(Source source, typename P::State::Codebooks codebooks, typename P::Stored stored,
                   double* partial) {
  __shared__ typename P::Tables tables;
  __shared__ Numbers shared;
  const Numbers& numbers = source.of(0, shared);
  tables.prepare(codebooks);
  __syncthreads();
  const Coefficients c = numbers.c;
  const P parameter(stored);
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
template <class Source>
__global__ void __launch_bounds__(kThreads) bound_kernel(Source source, const double* partial, int64_t parts,
                                                         double max_unorm, double* norms, float* size) {
  __shared__ Numbers shared;
  const Numbers& numbers = source.of(0, shared);
  double sums[2] = {};
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
    for (int k = 0; k < 2; k++) sums[k] += partial[i * 2 + k];
  }
  sum_pair_over_threads(sums);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 2; k++) norms[k] = sums[k];
  *size = step_size(numbers.lr, trust_ratio(max_unorm, sums), numbers.c.unit);
}

// How a step is launched. Source says where its numbers are.
template <class State, class Source>
struct Launcher {
  using Stored = typename State::Stored;
  using Batch = bnb::Batch<Stored>;

  const char* name;
  const OptimizerStep& step;
  const Parameters<Stored>& parameters;
  const typename State::Codebooks& codebooks;
  Source source;
  Stream stream;
  const float* bounded_size = nullptr;  // in the device's memory, where a norm bounds it

  // Has the numbers of so many parameters in memory, of those with these indices.
  void prepare(const int64_t* indices, int count) const {
    if constexpr (Source::in_memory) {
      Counts<Batch::kMost> counts = {};
      for (int i = 0; i < count; i++) counts.of[i] = parameters.count_of(indices[i]);
      launch(name, prepare_kernel<Batch::kMost>, 1, kThreads, stream, 0, step, counts, count, source.all);
    }
  }

  // Takes the norms of the parameter, by which its update is bounded, with scratch memory for so many parts.
  template <class P>
  void measure(int64_t parts, double* partial, double* norms) {
    const int64_t index = 0;
    prepare(&index, 1);
    float* const size = reinterpret_cast<float*>(partial + 2 * parts);
    launch(name, measure_kernel<P, Source>, resident_grid(parts, kThreads), kThreads, stream, 0, source,
           codebooks, *parameters.first, partial);
    launch(name, bound_kernel<Source>, 1, kThreads, stream, 0, source, partial, parts, step.max_unorm, norms,
           size);
    bounded_size = size;
  }

  // Updates all parameters that are plain, or all others, as P is.
  template <class P>
  void update_all() const {
    Batch batch = {};
    int64_t indices[Batch::kMost];
    const auto run = [&] {
      if (batch.count == 0) return;
      prepare(indices, batch.count);
      const int64_t blocks = batch.share_blocks();
      launch(name, update_kernel<P, Source>, blocks, kThreads, stream, 0, source, source.size_at_launch(),
             bounded_size, codebooks, batch);
      batch.count = 0;
    };
    for (int64_t i = 0; i < parameters.count; i++) {
      const P parameter(parameters.first[i]);
      const bool plain = parameter.aligned && parameter.n % kOptimizerBlock == 0 && !step.skip_zeros;
      if (parameter.n == 0 || plain != P::plain) continue;
      indices[batch.count] = i;
      batch.parameters[batch.count++] = parameters.first[i];
      if (batch.count == batch.kMost) run();
    }
    run();
  }
};

template <class State, class Source>
void update(Launcher<State, Source> launcher, double* norms) {
  const OptimizerStep& step = launcher.step;
  const auto& parameters = launcher.parameters;
  const bool bounded =
      step.max_unorm > 0 && takes_max_unorm(step.name) && parameters.count > 0 && parameters.first->n > 0;
  const int64_t parts = bounded ? ceil_div(parameters.first->n, kPartBlocks * kOptimizerBlock) : 0;
  const Workspace workspace(bounded ? 2 * parts * sizeof(double) + sizeof(float) : 0, launcher.stream);
  with_dtype(parameters.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_rule(step.name, [&](auto rule) {
      constexpr OptimizerName rule_name = decltype(rule)::name;
      using General = Parameter<rule_name, T, State, false>;
      using Plain = Parameter<rule_name, T, State, true>;
      if constexpr (takes_max_unorm(rule_name)) {
        if (bounded) launcher.template measure<General>(parts, workspace.as<double>(), norms);
      }
      launcher.template update_all<Plain>();
      launcher.template update_all<General>();
    });
  });
}

template <class State>
void optimizer_update(const char* name, const OptimizerStep& step,
                      const Parameters<typename State::Stored>& parameters,
                      const typename State::Codebooks& codebooks, double* norms, Stream stream) {
  using Batch = bnb::Batch<typename State::Stored>;
  if (parameters.counts || step.lr_in_memory) {
    const Workspace numbers(std::min<int64_t>(parameters.count, Batch::kMost) * sizeof(Numbers), stream);
    const NumbersInMemory source{numbers.as<Numbers>()};
    update(Launcher<State, NumbersInMemory>{name, step, parameters, codebooks, source, stream}, norms);
  } else {
    const Numbers source(step);
    update(Launcher<State, Numbers>{name, step, parameters, codebooks, source, stream}, norms);
  }
}

}  // namespace

void gpu::optimizer_update_32bit(const OptimizerStep& step, const Parameters<Parameter32bit>& parameters,
                                 double* norms, Stream stream) {
  optimizer_update<FloatState>("optimizer_update_32bit", step, parameters, {}, norms, stream);
}

void gpu::optimizer_update_8bit_blockwise(const OptimizerStep& step,
                                          const Parameters<Parameter8bit>& parameters,
                                          const StateCodebooks& codebooks, double* norms, Stream stream) {
  optimizer_update<ByteState>("optimizer_update_8bit_blockwise", step, parameters, codebooks, norms, stream);
}

}  // namespace bnb
