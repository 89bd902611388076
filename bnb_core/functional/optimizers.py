"""One step of an optimizer on one tensor."""

from __future__ import annotations

from torch import Tensor

from bnb_core import primitives
from bnb_core.records import OptimizerState8bit, OptimizerState32bit, OptimizerStep


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One optimizer step with f32 state, in place; :data:`bnb_core.primitives.optimizer_update_32bit` says more."""
    settings = OptimizerStep(
        optimizer_name, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros
    )
    primitives.optimizer_update_32bit(settings, g, p, OptimizerState32bit(state1, state2), unorm_vec)


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
    *,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """One optimizer step with 8-bit state, in place.

    :data:`bnb_core.primitives.optimizer_update_8bit_blockwise` says more.
    """
    settings = OptimizerStep(
        optimizer_name, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros
    )
    state = OptimizerState8bit(state1, state2, qmap1, qmap2, absmax1, absmax2)
    primitives.optimizer_update_8bit_blockwise(settings, g, p, state, unorm_vec)
