"""AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.hyperparameters import check_only
from bnb_core.optim.optimizer import Optimizer2State


class AdamW(Optimizer2State):
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Args:
        lr: step size.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient; a step takes ``lr * weight_decay`` of the parameter.
        amsgrad: False only.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        check_only("amsgrad", amsgrad, False)
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            capturable=capturable,
        )


class AdamW8bit(AdamW):
    """AdamW with 8-bit state."""

    state_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit state."""

    state_bits = 32


class PagedAdamW(AdamW):
    """AdamW with its state in paged memory, whatever ``is_paged`` says."""

    always_paged = True


class PagedAdamW8bit(PagedAdamW):
    """AdamW with 8-bit state in paged memory."""

    state_bits = 8


class PagedAdamW32bit(PagedAdamW):
    """AdamW with 32-bit state in paged memory."""

    state_bits = 32
