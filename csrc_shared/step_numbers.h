// The numbers of an optimizer's step, each by the same f64 operations on the host and on a device: the
// device's own powers and exponentials differ in the last bit. bnb_core/step_numbers.py is the same in
// Python.
#pragma once

#include "host_device.h"
#include "kernels.h"

namespace bnb {
namespace {

// By repeated squaring, from the exponent's lowest bit on.
BNB_HOST_DEVICE inline double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// e^x of an x <= 0: a series of what x is above the next multiple of ln 2 below 0, halved as often as that
// says.
BNB_HOST_DEVICE inline double exponential(double x) {
  constexpr double kLn2 = 0.693147180559945309417, kSmallestExponent = -750;
  constexpr int kTerms = 18;
  if (x < kSmallestExponent) return 0;
  const auto halvings = static_cast<int64_t>(-x / kLn2);
  const double rest = x + static_cast<double>(halvings) * kLn2;
  double result = 1;
  for (int term = kTerms; term > 0; term--) result = 1 + rest * result / term;
  return result * power(0.5, halvings);
}

// The step of a parameter with the numbers that memory holds, where it does; `count` may be null.
BNB_HOST_DEVICE inline OptimizerStep at_hand(OptimizerStep step, const double* count) {
  if (count) step.step = static_cast<int64_t>(*count);
  if (step.lr_in_memory) step.lr = *step.lr_in_memory;
  return step;
}

// The weight of AdEMAMix' slow average at a step.
BNB_HOST_DEVICE inline double scheduled_alpha(const OptimizerStep& s) {
  if (!(s.t_alpha > 0)) return s.alpha;
  const double risen = s.alpha * static_cast<double>(s.step) / s.t_alpha;
  return risen < s.alpha ? risen : s.alpha;
}

// Its decay, which goes from beta1 to beta3, linear in the steps after which it leaves a given share.
BNB_HOST_DEVICE inline double scheduled_beta3(const OptimizerStep& s) {
  if (!(s.t_beta3 > 0)) return s.beta3;
  const double share = static_cast<double>(s.step) / s.t_beta3, progress = share < 1 ? share : 1;
  double horizon = 0;
  if (s.log_beta1 < 0) horizon += (1 - progress) / s.log_beta1;
  if (s.log_beta3 < 0) horizon += progress / s.log_beta3;
  const double decay = horizon < 0 ? exponential(1 / horizon) : 0;
  return decay < s.beta3 ? decay : s.beta3;
}

}  // namespace
}  // namespace bnb
