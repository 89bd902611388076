"""The numbers of an optimizer's step, each by the same f64 operations wherever it is computed (docs/SPEC.md section 5).

A GPU's own powers and exponentials differ from the host's in the last bit, so that none are used: compiled kernels have
these functions in csrc_shared/step_numbers.h, Triton's in backends/triton/step_numbers.py.
"""

from __future__ import annotations

import math

from bnb_core.records import OptimizerStep

LN2 = math.log(2)
EXPONENTIAL_TERMS = 18
SMALLEST_EXPONENT = -750.0
"""Below it, e^x is less than the smallest f64."""


def power(base: float, exponent: int) -> float:
    """By repeated squaring, from the exponent's lowest bit on."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def exponential(x: float) -> float:
    """e^x of an x <= 0: a series of what x is above the next multiple of ln 2 below 0, halved as often as that says."""
    if x < SMALLEST_EXPONENT:
        return 0.0
    halvings = math.floor(-x / LN2)
    rest = x + halvings * LN2
    result = 1.0
    for term in range(EXPONENTIAL_TERMS, 0, -1):
        result = 1.0 + rest * result / term
    return result * power(0.5, halvings)


def log_or_zero(decay: float) -> float:
    """0 for a decay of 0, which leaves nothing after any step."""
    return math.log(decay) if decay > 0 else 0.0


def alpha_and_beta3(h: OptimizerStep) -> tuple[float, float]:
    """The weight of AdEMAMix' slow average at this step, and its decay (arXiv 2409.03137, section 3.1).

    The decay goes from beta1 to beta3, linear in the steps after which it leaves a given share: 1 / ln(decay).
    """
    alpha, beta3 = h.alpha, h.beta3
    if h.t_alpha > 0:
        alpha = min(alpha * h.step / h.t_alpha, alpha)
    if h.t_beta3 > 0:
        progress = min(h.step / h.t_beta3, 1.0)
        logs = ((1.0 - progress, log_or_zero(h.beta1)), (progress, log_or_zero(beta3)))
        horizon = sum(weight / log for weight, log in logs if log < 0)
        beta3 = min(exponential(1.0 / horizon) if horizon < 0 else 0.0, beta3)
    return alpha, beta3


def corrections(h: OptimizerStep) -> tuple[float, float]:
    """c1 and c2 of the rules, which undo that the averages begin at zero."""
    return 1.0 - power(h.beta1, h.step), math.sqrt(1.0 - power(h.beta2, h.step))


def at_hand(h: OptimizerStep) -> OptimizerStep:
    """The step with the numbers in its tensors as numbers, which waits for their device."""
    step = h.step if h.step_tensor is None else int(h.step_tensor.item())
    lr = h.lr if h.lr_tensor is None else h.lr_tensor.item()
    return h._replace(step=step, lr=lr, step_tensor=None, lr_tensor=None)


def scheduled(h: OptimizerStep) -> OptimizerStep:
    """The step with alpha and beta3 as they are at it."""
    alpha, beta3 = alpha_and_beta3(h)
    return h._replace(alpha=alpha, beta3=beta3, t_alpha=0.0, t_beta3=0.0)
