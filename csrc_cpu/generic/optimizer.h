// Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5).
//
// Parameters are updated in blocks of 256, all of it computed in f32. What an optimizer computes stands once,
// in `advance`; 8-bit state only adds decoding and encoding.
#pragma once

#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kBlock = 256;
constexpr int kPrefetched = kBlock;  // entries ahead of those in work
constexpr int kStates = 3;           // first moment, ademamix's slow first moment, second moment
constexpr int64_t kNormBlocks = 64;  // blocks that one partial norm is taken over

constexpr bool is_adam(OptimizerName name) {
  return name == OptimizerName::adam || name == OptimizerName::lamb;
}
constexpr bool has_momentum(OptimizerName name) {
  return name == OptimizerName::momentum || name == OptimizerName::lars;
}
// Whether weight decay goes into the gradient; otherwise it shrinks the parameter.
constexpr bool couples_decay(OptimizerName name) {
  return has_momentum(name) || name == OptimizerName::rmsprop || name == OptimizerName::adagrad;
}
constexpr bool uses_state(OptimizerName name, int state) {
  return state == 0 || name == OptimizerName::ademamix || (state == 2 && is_adam(name));
}
// Whether the update is divided by this state.
constexpr bool divides_by(OptimizerName name, int state) {
  if (name == OptimizerName::rmsprop || name == OptimizerName::adagrad) return state == 0;
  return state == 2 && uses_state(name, 2);
}

// What is the same for every entry, rounded to f32.
struct Coefficients {
  float gnorm_scale, beta1, beta2, beta3, rest1, rest2, rest3, alpha, eps, c1, c2, weight_decay, decay;
  float ignored_gradient;  // an entry whose gradient equals it is left alone; NaN: none
  bool first_step;
  float unit;  // the update is unit * numerator / denominator

  explicit Coefficients(const OptimizerStep& s)
      : gnorm_scale(round(s.gnorm_scale)),
        beta1(round(s.beta1)),
        beta2(round(s.beta2)),
        beta3(round(s.beta3)),
        rest1(round(1 - s.beta1)),
        rest2(round(1 - s.beta2)),
        rest3(round(1 - s.beta3)),
        alpha(round(s.alpha)),
        eps(round(s.eps)),
        c1(round(correction1(s))),
        c2(round(correction2(s))),
        weight_decay(round(s.weight_decay)),
        decay(round(1 - s.lr * s.weight_decay)),
        ignored_gradient(s.skip_zeros ? 0.0f : __builtin_nanf("")),
        first_step(s.step == 1),
        unit(1.0f) {
    if (is_adam(s.name)) {
      eps = round(s.eps * correction2(s));
      unit = round(correction2(s) / correction1(s));
    }
  }

  static float round(double x) { return static_cast<float>(x); }
  static double correction1(const OptimizerStep& s) { return 1 - power(s.beta1, s.step); }
  static double correction2(const OptimizerStep& s) { return __builtin_sqrt(1 - power(s.beta2, s.step)); }
  static double power(double beta, int64_t step) { return __builtin_pow(beta, static_cast<double>(step)); }
};

// Moves the state of some entries one step ahead and returns size * numerator / denominator of the update.
template <OptimizerName name>
BNB_INLINE F32 advance(const Coefficients& c, float size, F32 g, F32 p, F32 (&state)[kStates]) {
  if (couples_decay(name)) g += splat(c.weight_decay) * p;
  F32& m = state[0];
  F32& slow = state[1];
  F32& v = state[2];
  const F32 scale = splat(size);
  const F32 eps = splat(c.eps);
  if constexpr (is_adam(name)) {
    m = splat(c.beta1) * m + splat(c.rest1) * g;
    v = splat(c.beta2) * v + splat(c.rest2) * g * g;
    return scale * m / (sqrt(v) + eps);
  } else if constexpr (name == OptimizerName::ademamix) {
    m = splat(c.beta1) * m + splat(c.rest1) * g;
    slow = splat(c.beta3) * slow + splat(c.rest3) * g;
    v = splat(c.beta2) * v + splat(c.rest2) * g * g;
    return scale * (m / splat(c.c1) + splat(c.alpha) * slow) / (sqrt(v) / splat(c.c2) + eps);
  } else if constexpr (has_momentum(name)) {
    m = c.first_step ? g : splat(c.beta1) * m + g;
    return scale * m;
  } else if constexpr (name == OptimizerName::lion) {
    const F32 direction = splat(c.beta1) * m + splat(c.rest1) * g;
    m = splat(c.beta2) * m + splat(c.rest2) * g;
    const F32 positive = select(less(F32{}, direction), scale, F32{});
    return select(less(direction, F32{}), -scale, positive);
  } else if constexpr (name == OptimizerName::rmsprop) {
    m = splat(c.beta1) * m + splat(c.rest1) * g * g;
    return scale * g / (sqrt(m) + eps);
  } else {
    m += g * g;
    return scale * g / (sqrt(m) + eps);
  }
}

template <OptimizerName optimizer>
struct Rule {
  static constexpr OptimizerName name = optimizer;
};

// What a rule applies to: lamb and lars differ from adam and momentum in the size of their update only.
template <class F>
void with_rule(OptimizerName name, const F& f) {
  switch (name) {
    case OptimizerName::adam:
    case OptimizerName::lamb:
      return f(Rule<OptimizerName::adam>());
    case OptimizerName::ademamix:
      return f(Rule<OptimizerName::ademamix>());
    case OptimizerName::momentum:
    case OptimizerName::lars:
      return f(Rule<OptimizerName::momentum>());
    case OptimizerName::lion:
      return f(Rule<OptimizerName::lion>());
    case OptimizerName::rmsprop:
      return f(Rule<OptimizerName::rmsprop>());
    case OptimizerName::adagrad:
      return f(Rule<OptimizerName::adagrad>());
  }
}

// State in f32, used in place.
class FloatState {
 public:
  FloatState(float* state1, float* state2, int64_t n) : state_{state1, state1 + n, state2} {}

  // The state of one block of a parameter.
  template <OptimizerName name>
  class Block {
   public:
    Block(const FloatState& state, int64_t b) {
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

// State in 8 bits: decoded when it is read, encoded when the whole block is there.
class ByteState {
 public:
  ByteState(uint8_t* state1, uint8_t* state2, const float* qmap1, const float* qmap2, float* absmax1,
            float* absmax2, int64_t n)
      : signed_(qmap1, n),
        unsigned_(qmap2 ? qmap2 : qmap1, n),
        state_{state1, state1 + n, state2},
        absmax_{absmax1, absmax1 + ceil_div(n, kBlock), absmax2} {}

  template <OptimizerName name>
  class Block {
   public:
    Block(const ByteState& state, int64_t b) : state_(state), b_(b) {
      for (int s = 0; s < kStates; s++) {
        if (!uses_state(name, s)) continue;
        codes_[s] = state.state_[s] + b * kBlock;
        scale_[s] = splat(state.absmax_[s][b]);
      }
    }
    template <class Lanes>
    BNB_INLINE F32 get(int s, int64_t i, Lanes lanes) const {
      __builtin_prefetch(codes_[s] + i + kPrefetched);
      return Table<256>(state_.codebook(s).code)[load(codes_[s] + i, lanes)] * scale_[s];
    }
    template <class Lanes>
    BNB_INLINE void set(int s, int64_t i, F32 value, Lanes) {
      store(values_[s] + i, value);
    }
    void close(int64_t n) const {
      for (int s = 0; s < kStates; s++) {
        if (!uses_state(name, s)) continue;
        const BlockwiseEncoding& codebook = state_.codebook(s);
        float& absmax = state_.absmax_[s][b_];
        codebook.with_encoder(
            [&](const auto encode) { absmax = quantize_block(values_[s], n, encode, Bytes{codes_[s]}); });
        if (divides_by(name, s) && absmax > 0 && absmax < __builtin_inff())
          raise_zero_codes(values_[s], n, codebook.zero, codes_[s]);
      }
    }

   private:
    // A positive value takes the smallest positive code rather than that of zero: it will be divided by.
    static void raise_zero_codes(const float* values, int64_t n, int zero, uint8_t* codes) {
      for_each_vector(n, [&](int64_t i, auto lanes) {
        const I32 code = load(codes + i, lanes);
        const Mask raised = equal(code, splat(zero)) & less(F32{}, load(values + i, lanes));
        store(codes + i, increment(code, raised), lanes);
      });
    }

    const ByteState& state_;
    int64_t b_;
    uint8_t* codes_[kStates];
    F32 scale_[kStates];
    alignas(64) float values_[kStates][kBlock];
  };

 private:
  const BlockwiseEncoding& codebook(int state) const { return state == 2 ? unsigned_ : signed_; }

  BlockwiseEncoding signed_, unsigned_;
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
      const F32 update = advance<name>(c, size, scaled, value, after);
      for (int s = 0; s < kStates; s++) after[s] = select(ignored, before[s], after[s]);
      body(i, lanes, value, update, ignored, after);
    });
  }

  // The coefficients are a copy, which no value that is written can change.
  template <OptimizerName name>
  void update(const Coefficients c, float size, int64_t b) const {
    typename State::template Block<name> block(state, b);
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
    const typename State::template Block<name> block(state, b);
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

// s of the rules: the update is at most max_unorm times as long as the parameter.
float trust_ratio(double max_unorm, const double* norms) {
  if (norms[1] == 0) return 1.0f;
  const double ratio = max_unorm * __builtin_sqrt(norms[0]) / __builtin_sqrt(norms[1]);
  return ratio < 1 ? static_cast<float>(ratio) : 1.0f;
}

template <class State>
void optimizer_update(const OptimizerStep& step, const void* g, void* p, DType dtype, const State& state,
                      int64_t n, double* norms) {
  const Coefficients c(step);
  with_type(dtype, p, [&](auto* typed) {
    const Parameter<Pointee<decltype(typed)>, State> parameter{same_type(g, typed), typed, n, state};
    with_rule(step.name, [&](auto rule) {
      constexpr OptimizerName name = rule.name;
      float s = 1.0f;
      if (step.max_unorm > 0) {
        measure<name>(parameter, c, norms);
        s = trust_ratio(step.max_unorm, norms);
      }
      const float size = static_cast<float>(step.lr * s * c.unit);
      parallel_for(parameter.blocks(), grain(kBlock), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b++) parameter.template update<name>(c, size, b);
      });
    });
  });
}

void optimizer_update_32bit(const OptimizerStep& step, const void* g, void* p, DType dtype, float* state1,
                            float* state2, int64_t n, double* norms, Stream) {
  optimizer_update(step, g, p, dtype, FloatState(state1, state2, n), n, norms);
}

void optimizer_update_8bit_blockwise(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                     uint8_t* state1, uint8_t* state2, const float* qmap1, const float* qmap2,
                                     float* absmax1, float* absmax2, int64_t n, double* norms, Stream) {
  const ByteState state(state1, state2, qmap1, qmap2, absmax1, absmax2, n);
  optimizer_update(step, g, p, dtype, state, n, norms);
}

}  // namespace
}  // namespace bnb::BNB_TARGET
