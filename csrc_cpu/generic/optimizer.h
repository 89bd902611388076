// Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5).
//
// Parameters are updated in blocks of 256, all of it computed in f32. What an optimizer computes stands in
// csrc_shared/optimizer_rules.h; 8-bit state only adds decoding and encoding.
#pragma once

#include "../../csrc_shared/optimizer_rules.h"
#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kBlock = kOptimizerBlock;
constexpr int kPrefetched = kBlock;  // entries ahead of those in work
constexpr int64_t kNormBlocks = 64;  // blocks that one partial norm is taken over

struct VectorMath {
  static BNB_INLINE F32 sqrt(F32 x) { return BNB_TARGET::sqrt(x); }
};

// State in f32, used in place.
class FloatState {
 public:
  explicit FloatState(const Parameter32bit& given)
      : state_{given.state1, given.state1 + given.n, given.state2} {}

  // The state of one block of a parameter.
  template <OptimizerName name>
  class Block {
   public:
    Block(const FloatState& state, int64_t b, int64_t) {
      for (int s = 0; s < kStates; s++) {
        if (!uses_state(name, s)) continue;
        values_[s] = state.state_[s] + b * kBlock;
      }
    }
    template <class Lanes>
    BNB_INLINE F32 get(int s, int64_t i, Lanes lanes) const {
      __builtin_prefetch(values_[s] + i + kPrefetched);
      return load(values_[s] + i, lanes);
    }
    template <class Lanes>
    BNB_INLINE void set(int s, int64_t i, F32 value, Lanes lanes) {
      store(values_[s] + i, value, lanes);
    }
    void close(int64_t) const {}

   private:
    float* values_[kStates];
  };

 private:
  float* state_[kStates];
};

// Where the codes of a state go that is divided by: a positive value takes the smallest positive code rather
// than that of zero.
struct RaisedBytes {
  Bytes bytes;
  const float* values;
  int zero;
  void fill(int code, int64_t n) const { bytes.fill(code, n); }
  template <class Lanes>
  BNB_INLINE void put(int64_t i, I32 codes, Lanes lanes) const {
    const Mask raised = equal(codes, splat(zero)) & less(F32{}, load(values + i));
    bytes.put(i, increment(codes, raised), lanes);
  }
};

// State in 8 bits: decoded a block at a time, and encoded when the whole block is there.
template <class Encoding>
class ByteState {
 public:
  ByteState(const Parameter8bit& given, const StateCodebooks& codebooks)
      : signed_(codebooks.state1, given.n),
        unsigned_(codebooks.state2 ? codebooks.state2 : codebooks.state1, given.n),
        state_{given.state1, given.state1 + given.n, given.state2},
        absmax_{given.absmax1, given.absmax1 + ceil_div(given.n, kBlock), given.absmax2} {}

  template <OptimizerName name>
  class Block {
   public:
    Block(const ByteState& state, int64_t b, int64_t n) : state_(state), b_(b) {
      for (int s = 0; s < kStates; s++) {
        if (!uses_state(name, s)) continue;
        codes_[s] = state.state_[s] + b * kBlock;
        const F32 scale = splat(state.absmax_[s][b]);
        state.codebook(s).table.for_each(codes_[s], n, [&](int64_t i, auto, F32 values) {
          __builtin_prefetch(codes_[s] + i + kPrefetched);
          store(values_[s] + i, values * scale);
        });
      }
    }
    template <class Lanes>
    BNB_INLINE F32 get(int s, int64_t i, Lanes) const {
      return load(values_[s] + i);
    }
    template <class Lanes>
    BNB_INLINE void set(int s, int64_t i, F32 value, Lanes) {
      store(values_[s] + i, value);
    }
    void close(int64_t n) const {
      for (int s = 0; s < kStates; s++) {
        if (!uses_state(name, s)) continue;
        const Encoding& codebook = state_.codebook(s);
        codebook.with_encoder([&](const auto encode) {
          const Bytes codes{codes_[s]};
          float& absmax = state_.absmax_[s][b_];
          if (divides_by(name, s)) {
            absmax = quantize_block(values_[s], n, encode, RaisedBytes{codes, values_[s], encode.zero});
          } else {
            absmax = quantize_block(values_[s], n, encode, codes);
          }
        });
      }
    }

   private:
    const ByteState& state_;
    int64_t b_;
    uint8_t* codes_[kStates];
    alignas(64) float values_[kStates][kBlock];
  };

 private:
  const Encoding& codebook(int state) const { return state == 2 ? unsigned_ : signed_; }

  Encoding signed_, unsigned_;
  uint8_t* state_[kStates];
  float* absmax_[kStates];
};

// One bad entry must not decide how far the others move.
BNB_INLINE F32 finite_or_zero(F32 x) { return select(less(bits(abs(x)), splat(kInfinity)), x, F32{}); }

BNB_INLINE double square(double x) { return x * x; }

// The sum of squares in f64, in an order that depends on nothing but n.
double sum_of_squares(const float* x, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; j++) sums[j] += square(x[i + j]);
  }
  for (; i < n; i++) sums[i % kSums] += square(x[i]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// A parameter, its gradient and its state.
template <class T, class State>
struct Parameter {
  const T* g;
  T* p;
  int64_t n;
  const State& state;

  int64_t blocks() const { return ceil_div(n, kBlock); }

  // Calls body(i, lanes, p, update, state before, state after) for the vectors of a block. An entry that is
  // left alone has an update of zero and keeps its state.
  template <OptimizerName name, class Block, class Body>
  BNB_INLINE void for_each_update(const Coefficients& c, float size, int64_t b, const Block& block,
                                  const Body& body) const {
    const T* const gradient = g + b * kBlock;
    const T* const values = p + b * kBlock;
    for_each_vector(length(b), [&](int64_t i, auto lanes) {
      __builtin_prefetch(gradient + i + kPrefetched);
      __builtin_prefetch(values + i + kPrefetched);
      const F32 scaled = splat(c.gnorm_scale) * load(gradient + i, lanes);
      const F32 value = load(values + i, lanes);
      const Mask ignored = equal(scaled, splat(c.ignored_gradient));
      F32 before[kStates] = {}, after[kStates] = {};
      for (int s = 0; s < kStates; s++) {
        if (uses_state(name, s)) before[s] = after[s] = block.get(s, i, lanes);
      }
      const F32 update = advance<name, VectorMath>(c, size, scaled, value, after);
      for (int s = 0; s < kStates; s++) after[s] = select(ignored, before[s], after[s]);
      body(i, lanes, value, update, ignored, after);
    });
  }

  // The coefficients are a copy, which no value that is written can change.
  template <OptimizerName name>
  void update(const Coefficients c, float size, int64_t b) const {
    typename State::template Block<name> block(state, b, length(b));
    for_each_update<name>(
        c, size, b, block,
        [&](int64_t i, auto lanes, F32 value, F32 update, Mask ignored, const F32(&after)[kStates]) {
          const F32 decayed = couples_decay(name) ? value : value * splat(c.decay);
          store(p + b * kBlock + i, select(ignored, value, decayed - update), lanes);
          for (int s = 0; s < kStates; s++) {
            if (uses_state(name, s)) block.set(s, i, after[s], lanes);
          }
        });
    block.close(length(b));
  }

  // Adds |p|^2 and |update|^2 of a block, the update before the learning rate.
  template <OptimizerName name>
  void measure(const Coefficients& c, int64_t b, double* sums) const {
    const typename State::template Block<name> block(state, b, length(b));
    alignas(64) float values[kBlock], updates[kBlock];
    for_each_update<name>(c, c.unit, b, block,
                          [&](int64_t i, auto, F32 value, F32 update, Mask ignored, const F32(&)[kStates]) {
                            store(values + i, finite_or_zero(value));
                            store(updates + i, select(ignored, F32{}, finite_or_zero(update)));
                          });
    sums[0] += sum_of_squares(values, length(b));
    sums[1] += sum_of_squares(updates, length(b));
  }

 private:
  int64_t length(int64_t b) const { return min(kBlock, n - b * kBlock); }
};

// norms: |p|^2 and |update|^2.
template <OptimizerName name, class P>
void measure(const P& parameter, const Coefficients& c, double* norms) {
  const int64_t parts = ceil_div(parameter.blocks(), kNormBlocks);
  const Buffer<double> partial(2 * parts);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      double* sums = partial.data() + 2 * part;
      sums[0] = sums[1] = 0;
      const int64_t end_block = min((part + 1) * kNormBlocks, parameter.blocks());
      for (int64_t b = part * kNormBlocks; b < end_block; b++) {
        parameter.template measure<name>(c, b, sums);
      }
    }
  });
  norms[0] = norms[1] = 0;
  for (int64_t i = 0; i < 2 * parts; i++) norms[i % 2] += partial.data()[i];
}

// Parameters of so many elements keep all threads busy by themselves.
constexpr int64_t kLarge = 1 << 16;
// The least work for a thread, in elements.
constexpr int64_t kLeastElements = 1 << 13;

// Small parameters in one parallel region, each by one thread; large ones in turn, each by all threads.
//
// Calls body(parameter, its number).
template <class Given, class Body>
void for_each_parameter(const Parameters<Given>& parameters, const Body& body) {
  const Buffer<int64_t> small(parameters.count);
  int64_t count = 0, elements = 0;
  for (int64_t i = 0; i < parameters.count; i++) {
    const Given& given = parameters.first[i];
    if (given.n >= kLarge) {
      body(given, i);
    } else {
      small.data()[count++] = i;
      elements += given.n;
    }
  }
  const int64_t least = elements > 0 ? ceil_div(kLeastElements * count, elements) : count;
  parallel_for(count, least, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(parameters.first[small.data()[i]], small.data()[i]);
  });
}

// A parameter's state is State(parameter, codebooks...).
template <class State, class Given, class... Codebooks>
void optimizer_update(const OptimizerStep& step, const Parameters<Given>& parameters, double* norms,
                      const Codebooks&... codebooks) {
  const Coefficients shared(step);
  const bool in_memory = parameters.counts || step.lr_in_memory;
  for_each_parameter(parameters, [&](const Given& given, int64_t i) {
    const OptimizerStep own = at_hand(step, parameters.count_of(i));
    const Coefficients c = in_memory ? Coefficients(own) : shared;
    const State state(given, codebooks...);
    with_type(parameters.dtype, given.p, [&](auto* p) {
      const Parameter<Pointee<decltype(p)>, State> parameter{same_type(given.g, p), p, given.n, state};
      with_rule(step.name, [&](auto rule) {
        constexpr OptimizerName name = rule.name;
        float s = 1.0f;
        if (step.max_unorm > 0) {
          measure<name>(parameter, c, norms);
          s = trust_ratio(step.max_unorm, norms);
        }
        const float size = step_size(own.lr, s, c.unit);
        parallel_for(parameter.blocks(), grain(kBlock), [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; b++) parameter.template update<name>(c, size, b);
        });
      });
    });
  });
}

void optimizer_update_32bit(const OptimizerStep& step, const Parameters<Parameter32bit>& parameters,
                            double* norms, Stream) {
  optimizer_update<FloatState>(step, parameters, norms);
}

template <class Encoding>
void optimizer_update_8bit_blockwise(const OptimizerStep& step, const Parameters<Parameter8bit>& parameters,
                                     const StateCodebooks& codebooks, double* norms, Stream) {
  optimizer_update<ByteState<Encoding>>(step, parameters, norms, codebooks);
}

}  // namespace
}  // namespace bnb::BNB_TARGET
