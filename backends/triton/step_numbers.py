"""The numbers of an optimizer's step where its count or learning rate is in the device's memory.

The functions are those of bnb_core/step_numbers.py, with the same f64 operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnb_core import step_numbers
from bnb_core.records import OptimizerStep

from .launch import launch

LN2 = tl.constexpr(step_numbers.LN2)
EXPONENTIAL_TERMS = tl.constexpr(step_numbers.EXPONENTIAL_TERMS)
SMALLEST_EXPONENT = tl.constexpr(step_numbers.SMALLEST_EXPONENT)

UNIT, SIZE, ALPHA, EPS, BETA3, REST3, DECAY, IS_FIRST = (tl.constexpr(place) for place in range(8))
"""Where each is in f32[8]: the factor of an update beside lr, that with lr, and some arguments of optimizer_kernel."""


@triton.jit
def f64(VALUE: tl.constexpr):
    return tl.full((), VALUE, tl.float64)


@triton.jit
def power(base, exponent):
    result = f64(1.0)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base *= base
        exponent = exponent // 2
    return result


@triton.jit
def exponential(x):
    # Far below, where the result is 0, what the series would give does not count.
    bounded = tl.maximum(x, f64(SMALLEST_EXPONENT))
    halvings = (-bounded / f64(LN2)).to(tl.int64)
    rest = bounded + halvings.to(tl.float64) * f64(LN2)
    result = f64(1.0)
    for index in tl.static_range(EXPONENTIAL_TERMS):
        result = f64(1.0) + rest * result / f64(EXPONENTIAL_TERMS - index)
    return tl.where(x < f64(SMALLEST_EXPONENT), f64(0.0), result * power(f64(0.5), halvings))


@triton.jit
def scheduled_beta3(step, BETA3: tl.constexpr, T_BETA3: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA3: tl.constexpr):
    progress = tl.minimum(step / f64(T_BETA3), f64(1.0))
    horizon = f64(0.0)
    if LOG_BETA1 < 0:
        horizon += (f64(1.0) - progress) / f64(LOG_BETA1)
    if LOG_BETA3 < 0:
        horizon += progress / f64(LOG_BETA3)
    lasts = horizon < 0
    decay = tl.where(lasts, exponential(f64(1.0) / tl.where(lasts, horizon, f64(-1.0))), f64(0.0))
    return tl.minimum(decay, f64(BETA3))


@triton.jit
def step_numbers_kernel(
    step_tensor,
    lr_tensor,
    numbers,
    RULE: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BETA3_AT_LAST: tl.constexpr,
    ALPHA_AT_LAST: tl.constexpr,
    EPS_ITSELF: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    T_ALPHA: tl.constexpr,
    T_BETA3: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA3: tl.constexpr,
):
    """One program. Hyperparameters are constants, as other numbers would be passed in f32."""
    step = tl.load(step_tensor)
    lr = tl.load(lr_tensor)
    unit, alpha, eps, beta3 = f64(1.0), f64(ALPHA_AT_LAST), f64(EPS_ITSELF), f64(BETA3_AT_LAST)
    if T_ALPHA > 0:
        alpha = tl.minimum(alpha * step / f64(T_ALPHA), alpha)
    if T_BETA3 > 0:
        beta3 = scheduled_beta3(step, BETA3_AT_LAST, T_BETA3, LOG_BETA1, LOG_BETA3)
    if RULE == "adam" or RULE == "ademamix":
        count = step.to(tl.int64)
        c1 = f64(1.0) - power(f64(BETA1), count)
        c2 = tl.sqrt(f64(1.0) - power(f64(BETA2), count))
        unit, alpha, eps = c2 / c1, alpha * c1, eps * c2
    tl.store(numbers + UNIT, unit.to(tl.float32))
    tl.store(numbers + SIZE, (lr * unit).to(tl.float32))
    tl.store(numbers + ALPHA, alpha.to(tl.float32))
    tl.store(numbers + EPS, eps.to(tl.float32))
    tl.store(numbers + BETA3, beta3.to(tl.float32))
    tl.store(numbers + REST3, (f64(1.0) - beta3).to(tl.float32))
    tl.store(numbers + DECAY, (f64(1.0) - lr * f64(WEIGHT_DECAY)).to(tl.float32))
    tl.store(numbers + IS_FIRST, (step == 1).to(tl.float32))


def numbers_in_memory(rule: str, h: OptimizerStep, device: torch.device) -> Tensor | None:
    """f32[8] where the step's count or learning rate is a tensor, else None."""
    if h.step_tensor is None and h.lr_tensor is None:
        return None
    step, lr = (
        torch.full((), number, dtype=torch.float64, device=device) if tensor is None else tensor
        for number, tensor in ((h.step, h.step_tensor), (h.lr, h.lr_tensor))
    )
    numbers = torch.empty(8, dtype=torch.float32, device=device)
    constants = {
        "RULE": rule,
        "BETA1": h.beta1,
        "BETA2": h.beta2,
        "BETA3_AT_LAST": h.beta3,
        "ALPHA_AT_LAST": h.alpha,
        "EPS_ITSELF": h.eps,
        "WEIGHT_DECAY": h.weight_decay,
        "T_ALPHA": h.t_alpha,
        "T_BETA3": h.t_beta3,
        "LOG_BETA1": step_numbers.log_or_zero(h.beta1),
        "LOG_BETA3": step_numbers.log_or_zero(h.beta3),
    }
    launch(step_numbers_kernel, 1, step, lr, numbers, **constants)
    return numbers
