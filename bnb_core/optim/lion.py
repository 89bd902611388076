"""Lion (arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.optimizer import Optimizer1State


class Lion(Optimizer1State):
    """Lion: the sign of an interpolated momentum (arXiv 2302.06675).

    Args:
        lr: step size of every entry.
        betas: weight of the momentum in the update, and decay of the momentum itself.
        weight_decay: decoupled from the gradient; a step takes ``lr * weight_decay`` of the parameter.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            capturable=capturable,
        )


class LionOfFixedBits(Lion):
    """The base of those classes that have the bits in their name: they do not take them as an argument."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            capturable=capturable,
        )


class Lion8bit(LionOfFixedBits):
    """Lion with 8-bit state."""

    state_bits = 8


class Lion32bit(LionOfFixedBits):
    """Lion with 32-bit state."""

    state_bits = 32


class PagedLion(Lion):
    """Lion with its state in paged memory, whatever ``is_paged`` says."""

    always_paged = True


class PagedLion8bit(PagedLion, Lion8bit):
    """Lion with 8-bit state in paged memory."""


class PagedLion32bit(PagedLion, Lion32bit):
    """Lion with 32-bit state in paged memory."""
