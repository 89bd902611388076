"""AdEMAMix (arXiv 2409.03137)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.optimizer import Optimizer2State


class AdEMAMix(Optimizer2State):
    """AdEMAMix: Adam with a second, slow average of the gradient (arXiv 2409.03137).

    Args:
        lr: step size.
        betas: decay of the fast average, of the second moment and of the slow average.
        alpha: weight of the slow average.
        t_alpha: steps over which alpha rises from 0; None for alpha from the start.
        t_beta3: steps over which the slow average's decay rises from the fast one's; None for all of it at once.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient; a step takes ``lr * weight_decay`` of the parameter.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            "ademamix", params, lr, betas, eps, weight_decay, optim_bits, None, min_8bit_size,
            is_paged=is_paged, alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3,
        )  # fmt: skip


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit state."""

    state_bits = 8


class AdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit state."""

    state_bits = 32


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with its state in paged memory, whatever ``is_paged`` says."""

    always_paged = True


class PagedAdEMAMix8bit(PagedAdEMAMix):
    """AdEMAMix with 8-bit state in paged memory."""

    state_bits = 8


class PagedAdEMAMix32bit(PagedAdEMAMix):
    """AdEMAMix with 32-bit state in paged memory."""

    state_bits = 32
