"""Adam (arXiv 1412.6980)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.hyperparameters import check_only
from bnb_core.optim.optimizer import Optimizer2State


class Adam(Optimizer2State):
    """Adam (arXiv 1412.6980). Weight decay is decoupled, as in AdamW, which differs in its default only.

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
        weight_decay: float = 0,
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


class Adam8bit(Adam):
    """Adam with 8-bit state."""

    state_bits = 8


class Adam32bit(Adam):
    """Adam with 32-bit state."""

    state_bits = 32


class PagedAdam(Adam):
    """Adam with its state in paged memory, whatever ``is_paged`` says."""

    always_paged = True


class PagedAdam8bit(PagedAdam):
    """Adam with 8-bit state in paged memory."""

    state_bits = 8


class PagedAdam32bit(PagedAdam):
    """Adam with 32-bit state in paged memory."""

    state_bits = 32
