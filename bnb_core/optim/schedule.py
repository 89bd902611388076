"""What AdEMAMix changes from step to step (arXiv 2409.03137, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def alpha_and_beta3(config: Mapping[str, Any], step: int) -> tuple[float, float]:
    """The weight of the slow average at this step, and its decay."""
    alpha, t_alpha, t_beta3 = config["alpha"], config["t_alpha"], config["t_beta3"]
    beta1, _, beta3 = config["betas"]
    if t_alpha is not None:
        alpha = min(alpha * step / t_alpha, alpha)
    if t_beta3 is not None:
        beta3 = min(_interpolated_decay(beta1, beta3, min(step / t_beta3, 1.0)), beta3)
    return alpha, beta3


def _interpolated_decay(first: float, last: float, progress: float) -> float:
    """From ``first`` to ``last``, linear in the steps after which a decay leaves a given share: 1 / ln(decay).

    A decay of 0 leaves nothing after any step: its 1 / ln(decay) is 0.
    """
    horizon = sum(weight / math.log(decay) for weight, decay in ((1 - progress, first), (progress, last)) if decay > 0)
    return math.exp(1 / horizon) if horizon else 0.0
