// What the optimizers compute (docs/SPEC.md section 5), once for vectors of floats on CPUs and for single
// ones on GPUs.
//
// All of it has internal linkage: sources compiled for different instruction sets must not share a function.
#pragma once

#include "host_device.h"
#include "kernels.h"
#include "step_numbers.h"

namespace bnb {
namespace {

constexpr int kOptimizerBlock = 256;  // entries that share an absmax of 8-bit state
constexpr int kStates = 3;            // first moment, ademamix's slow first moment, second moment

BNB_HOST_DEVICE constexpr bool is_adam(OptimizerName name) {
  return name == OptimizerName::adam || name == OptimizerName::lamb;
}
BNB_HOST_DEVICE constexpr bool has_momentum(OptimizerName name) {
  return name == OptimizerName::momentum || name == OptimizerName::lars;
}
// Whether weight decay goes into the gradient; otherwise it shrinks the parameter.
BNB_HOST_DEVICE constexpr bool couples_decay(OptimizerName name) {
  return has_momentum(name) || name == OptimizerName::rmsprop || name == OptimizerName::adagrad;
}
BNB_HOST_DEVICE constexpr bool uses_state(OptimizerName name, int state) {
  return state == 0 || name == OptimizerName::ademamix || (state == 2 && is_adam(name));
}
// Whether the update is divided by this state.
BNB_HOST_DEVICE constexpr bool divides_by(OptimizerName name, int state) {
  if (name == OptimizerName::rmsprop || name == OptimizerName::adagrad) return state == 0;
  return state == 2 && uses_state(name, 2);
}

BNB_HOST_DEVICE constexpr int divisor_of(OptimizerName name) { return divides_by(name, 0) ? 0 : 2; }
BNB_HOST_DEVICE constexpr bool has_divisor(OptimizerName name) { return divides_by(name, divisor_of(name)); }

// What is the same for every entry, rounded to f32.
struct Coefficients {
  float gnorm_scale, beta1, beta2, beta3, rest1, rest2, rest3, alpha, eps, weight_decay, decay;
  float ignored_gradient;  // an entry whose gradient equals it is left alone; NaN: none
  bool first_step;
  float unit;  // the update is unit * numerator / denominator

  Coefficients() = default;
  explicit BNB_HOST_DEVICE Coefficients(const OptimizerStep& s)
      : gnorm_scale(round(s.gnorm_scale)),
        beta1(round(s.beta1)),
        beta2(round(s.beta2)),
        beta3(round(scheduled_beta3(s))),
        rest1(round(1 - s.beta1)),
        rest2(round(1 - s.beta2)),
        rest3(round(1 - scheduled_beta3(s))),
        alpha(round(s.alpha)),
        eps(round(s.eps)),
        weight_decay(round(s.weight_decay)),
        decay(round(1 - s.lr * s.weight_decay)),
        ignored_gradient(s.skip_zeros ? 0.0f : __builtin_nanf("")),
        first_step(s.step == 1),
        unit(1.0f) {
    if (is_adam(s.name) || s.name == OptimizerName::ademamix) {
      alpha = round(scheduled_alpha(s) * correction1(s));
      eps = round(s.eps * correction2(s));
      unit = round(correction2(s) / correction1(s));
    }
  }

  static BNB_HOST_DEVICE float round(double x) { return static_cast<float>(x); }
  static BNB_HOST_DEVICE double correction1(const OptimizerStep& s) { return 1 - power(s.beta1, s.step); }
  static BNB_HOST_DEVICE double correction2(const OptimizerStep& s) {
    return __builtin_sqrt(1 - power(s.beta2, s.step));
  }
};

// Moves the state of some entries one step ahead and returns size * numerator of the update.
//
// V is a float or a vector of them.
template <OptimizerName name, class V>
BNB_HOST_DEVICE BNB_ALWAYS_INLINE V advance_state(const Coefficients& c, float size, V g, V p,
                                                  V (&state)[kStates]) {
  if constexpr (couples_decay(name)) g += c.weight_decay * p;
  V& m = state[0];
  V& slow = state[1];
  V& v = state[2];
  if constexpr (is_adam(name)) {
    m = c.beta1 * m + c.rest1 * g;
    v = c.beta2 * v + c.rest2 * g * g;
    return size * m;
  } else if constexpr (name == OptimizerName::ademamix) {
    m = c.beta1 * m + c.rest1 * g;
    slow = c.beta3 * slow + c.rest3 * g;
    v = c.beta2 * v + c.rest2 * g * g;
    return size * (m + c.alpha * slow);
  } else if constexpr (has_momentum(name)) {
    m = c.first_step ? g : c.beta1 * m + g;
    return size * m;
  } else if constexpr (name == OptimizerName::lion) {
    const V direction = c.beta1 * m + c.rest1 * g;
    m = c.beta2 * m + c.rest2 * g;
    const V zero = {}, forward = zero + size;
    return direction > zero ? forward : direction < zero ? -forward : zero;
  } else if constexpr (name == OptimizerName::rmsprop) {
    m = c.beta1 * m + c.rest1 * g * g;
    return size * g;
  } else {
    m += g * g;
    return size * g;
  }
}

// The same, and returns size * numerator / denominator. Math::sqrt is V's square root.
template <OptimizerName name, class Math, class V>
BNB_HOST_DEVICE BNB_ALWAYS_INLINE V advance(const Coefficients& c, float size, V g, V p,
                                            V (&state)[kStates]) {
  const V numerator = advance_state<name>(c, size, g, p, state);
  if constexpr (has_divisor(name)) {
    return numerator / (Math::sqrt(state[divisor_of(name)]) + c.eps);
  } else {
    return numerator;
  }
}

template <OptimizerName optimizer>
struct Rule {
  static constexpr OptimizerName name = optimizer;
};

// Calls f with the rule that applies: lamb and lars differ from adam and momentum in the size of their update
// only.
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

// Whether a norm over the parameter can bound the update.
BNB_HOST_DEVICE constexpr bool takes_max_unorm(OptimizerName name) {
  return name != OptimizerName::ademamix && name != OptimizerName::adagrad;
}

// s of the rules, from |p|^2 and |update|^2: the update is at most max_unorm times as long as the parameter.
BNB_HOST_DEVICE inline float trust_ratio(double max_unorm, const double* norms) {
  if (norms[1] == 0) return 1.0f;
  const double ratio = max_unorm * __builtin_sqrt(norms[0]) / __builtin_sqrt(norms[1]);
  return ratio < 1 ? static_cast<float>(ratio) : 1.0f;
}

// The `size` of a step, given s.
BNB_HOST_DEVICE inline float step_size(double lr, float s, float unit) {
  return static_cast<float>(lr * s * unit);
}

}  // namespace
}  // namespace bnb
