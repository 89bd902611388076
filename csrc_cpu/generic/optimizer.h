// Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5).
//
// Parameters are updated in blocks of 256: gradient and parameter widened to f32, the state as f32 or decoded
// to it. What an optimizer computes stands once, in `advance`; 8-bit state only adds decoding and encoding.
#pragma once

#include "quantize.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int kBlock = 256;
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

// One block in f32. Lanes beyond the block's end are computed and dropped.
struct Block {
  alignas(64) float g[kBlock];
  alignas(64) float p[kBlock];
  float* state[kStates];
  alignas(64) float decoded[kStates][kBlock];
};

template <OptimizerName name>
void update_block(const Coefficients& c, float size, Block& block, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 g = splat(c.gnorm_scale) * load(block.g + i);
    const F32 p = load(block.p + i);
    F32 state[kStates] = {};
    for (int s = 0; s < kStates; s++) {
      if (uses_state(name, s)) state[s] = load(block.state[s] + i);
    }
    const F32 before[kStates] = {state[0], state[1], state[2]};
    const F32 update = advance<name>(c, size, g, p, state);
    const Mask ignored = equal(g, splat(c.ignored_gradient));
    const F32 decayed = couples_decay(name) ? p : p * splat(c.decay);
    store(block.p + i, select(ignored, p, decayed - update));
    for (int s = 0; s < kStates; s++) {
      if (uses_state(name, s)) store(block.state[s] + i, select(ignored, before[s], state[s]));
    }
  }
}

// Replaces the gradient of a block by its update before the learning rate; the state stays.
template <OptimizerName name>
void measure_block(const Coefficients& c, Block& block, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 g = splat(c.gnorm_scale) * load(block.g + i);
    F32 state[kStates] = {};
    for (int s = 0; s < kStates; s++) {
      if (uses_state(name, s)) state[s] = load(block.state[s] + i);
    }
    const F32 update = advance<name>(c, c.unit, g, load(block.p + i), state);
    store(block.g + i, select(equal(g, splat(c.ignored_gradient)), F32{}, update));
  }
}

struct Rule {
  void (*update)(const Coefficients&, float size, Block&, int64_t n);
  void (*measure)(const Coefficients&, Block&, int64_t n);
};

template <OptimizerName name>
constexpr Rule rule() {
  return {update_block<name>, measure_block<name>};
}

Rule rule_of(OptimizerName name) {
  switch (name) {
    case OptimizerName::adam:
    case OptimizerName::lamb:
      return rule<OptimizerName::adam>();
    case OptimizerName::ademamix:
      return rule<OptimizerName::ademamix>();
    case OptimizerName::momentum:
    case OptimizerName::lars:
      return rule<OptimizerName::momentum>();
    case OptimizerName::lion:
      return rule<OptimizerName::lion>();
    case OptimizerName::rmsprop:
      return rule<OptimizerName::rmsprop>();
    case OptimizerName::adagrad:
      return rule<OptimizerName::adagrad>();
  }
  __builtin_unreachable();
}

// State in f32: whole blocks are used in place.
class FloatState {
 public:
  FloatState(OptimizerName name, float* state1, float* state2, int64_t n)
      : name_(name), state_{state1, state1 + n, state2} {}

  void open(int64_t b, int64_t n, Block& block) const {
    for (int s = 0; s < kStates; s++) {
      if (!uses_state(name_, s)) continue;
      block.state[s] = n == kBlock ? state_[s] + b * kBlock : block.decoded[s];
      if (n < kBlock) __builtin_memcpy(block.state[s], state_[s] + b * kBlock, n * sizeof(float));
    }
  }
  void close(int64_t b, int64_t n, const Block& block) const {
    if (n == kBlock) return;
    for (int s = 0; s < kStates; s++) {
      if (uses_state(name_, s)) {
        __builtin_memcpy(state_[s] + b * kBlock, block.state[s], n * sizeof(float));
      }
    }
  }

 private:
  OptimizerName name_;
  float* state_[kStates];
};

// State in 8 bits: decoded when a block is opened, encoded when it is closed.
class ByteState {
 public:
  ByteState(OptimizerName name, uint8_t* state1, uint8_t* state2, const float* qmap1, const float* qmap2,
            float* absmax1, float* absmax2, int64_t n)
      : name_(name),
        signed_(qmap1),
        unsigned_(qmap2 ? qmap2 : qmap1),
        state_{state1, state1 + n, state2},
        absmax_{absmax1, absmax1 + ceil_div(n, kBlock), absmax2} {}

  void open(int64_t b, int64_t n, Block& block) const {
    for (int s = 0; s < kStates; s++) {
      if (!uses_state(name_, s)) continue;
      block.state[s] = block.decoded[s];
      const Table<256> code(codebook(s).code);
      dequantize_block(state_[s] + b * kBlock, absmax_[s][b], code, n, block.state[s]);
    }
  }
  void close(int64_t b, int64_t n, const Block& block) const {
    for (int s = 0; s < kStates; s++) {
      if (!uses_state(name_, s)) continue;
      const Codebook& book = codebook(s);
      const BlockwiseEncoder encode(book.thresholds, book.zero);
      uint8_t* codes = state_[s] + b * kBlock;
      absmax_[s][b] = quantize_block(block.state[s], n, encode, Bytes{codes});
      if (divides_by(name_, s) && absmax_[s][b] > 0 && absmax_[s][b] < __builtin_inff())
        raise_zero_codes(block.state[s], n, book.zero, codes);
    }
  }

 private:
  struct Codebook {
    const float* code;
    Thresholds<8> thresholds;
    int zero;
    explicit Codebook(const float* code) : code(code), thresholds(code), zero(zero_code(code)) {}
  };

  const Codebook& codebook(int state) const { return state == 2 ? unsigned_ : signed_; }

  // A positive value takes the smallest positive code rather than that of zero: it will be divided by.
  static void raise_zero_codes(const float* values, int64_t n, int zero, uint8_t* codes) {
    for (int64_t i = 0; i < n; i++) codes[i] += codes[i] == zero && values[i] > 0;
  }

  OptimizerName name_;
  Codebook signed_, unsigned_;
  uint8_t* state_[kStates];
  float* absmax_[kStates];
};

// A parameter, its gradient and its state.
template <class T, class State>
struct Parameter {
  const T* g;
  T* p;
  int64_t n;
  const State& state;

  int64_t open(int64_t b, Block& block) const {
    const int64_t length = min(kBlock, n - b * kBlock);
    for_each_vector(length, [&](int64_t i, auto lanes) {
      store(block.g + i, load(g + b * kBlock + i, lanes));
      store(block.p + i, load(p + b * kBlock + i, lanes));
    });
    state.open(b, length, block);
    return length;
  }
  void close(int64_t b, int64_t length, const Block& block) const {
    for_each_vector(length,
                    [&](int64_t i, auto lanes) { store(p + b * kBlock + i, load(block.p + i), lanes); });
    state.close(b, length, block);
  }
};

// Of a finite entry: one bad entry must not decide how far the others move.
double finite_square(float x) { return __builtin_isfinite(x) ? static_cast<double>(x) * x : 0.0; }

// The sum of squares in f64, in an order that depends on nothing but n.
double sum_of_squares(const float* x, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; j++) sums[j] += finite_square(x[i + j]);
  }
  for (; i < n; i++) sums[i % kSums] += finite_square(x[i]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// norms: |p|^2 and |update|^2.
template <class P>
void measure(const P& parameter, const Rule& rule, const Coefficients& c, double* norms) {
  const int64_t blocks = ceil_div(parameter.n, kBlock);
  const int64_t parts = ceil_div(blocks, kNormBlocks);
  const Buffer<double> partial(2 * parts);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    Block block = {};
    for (int64_t part = begin; part < end; part++) {
      double* sums = partial.data() + 2 * part;
      sums[0] = sums[1] = 0;
      for (int64_t b = part * kNormBlocks; b < min((part + 1) * kNormBlocks, blocks); b++) {
        const int64_t length = parameter.open(b, block);
        rule.measure(c, block, length);
        sums[0] += sum_of_squares(block.p, length);
        sums[1] += sum_of_squares(block.g, length);
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
  const Rule rule = rule_of(step.name);
  with_type(dtype, p, [&](auto* typed) {
    const Parameter<Pointee<decltype(typed)>, State> parameter{same_type(g, typed), typed, n, state};
    float s = 1.0f;
    if (step.max_unorm > 0) {
      measure(parameter, rule, c, norms);
      s = trust_ratio(step.max_unorm, norms);
    }
    const float size = static_cast<float>(step.lr * s * c.unit);
    parallel_for(ceil_div(n, kBlock), grain(kBlock), [&](int64_t begin, int64_t end) {
      Block block = {};
      for (int64_t b = begin; b < end; b++) {
        const int64_t length = parameter.open(b, block);
        rule.update(c, size, block, length);
        parameter.close(b, length, block);
      }
    });
  });
}

void optimizer_update_32bit(const OptimizerStep& step, const void* g, void* p, DType dtype, float* state1,
                            float* state2, int64_t n, double* norms, Stream) {
  optimizer_update(step, g, p, dtype, FloatState(step.name, state1, state2, n), n, norms);
}

void optimizer_update_8bit_blockwise(const OptimizerStep& step, const void* g, void* p, DType dtype,
                                     uint8_t* state1, uint8_t* state2, const float* qmap1, const float* qmap2,
                                     float* absmax1, float* absmax2, int64_t n, double* norms, Stream) {
  const ByteState state(step.name, state1, state2, qmap1, qmap2, absmax1, absmax2, n);
  optimizer_update(step, g, p, dtype, state, n, norms);
}

}  // namespace
}  // namespace bnb::BNB_TARGET
