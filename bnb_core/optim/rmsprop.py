"""RMSprop (Tieleman and Hinton, 2012)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.hyperparameters import check_only
from bnb_core.optim.optimizer import Optimizer1State


class RMSprop(Optimizer1State):
    """RMSprop (Tieleman and Hinton, Coursera lecture 6.5, 2012).

    Args:
        lr: step size.
        alpha: decay of the squared gradient's average.
        eps: added to the root of that average.
        weight_decay: added to the gradient as ``weight_decay * p``.
        momentum: 0 only.
        centered: False only.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        check_only("momentum", momentum, 0)
        check_only("centered", centered, False)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, 0.0),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            capturable=capturable,
        )


class RMSpropOfFixedBits(RMSprop):
    """The base of those classes that have the bits in their name: they do not take them as an argument."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            args=args,
            min_8bit_size=min_8bit_size,
            capturable=capturable,
        )


class RMSprop8bit(RMSpropOfFixedBits):
    """RMSprop with 8-bit state."""

    state_bits = 8


class RMSprop32bit(RMSpropOfFixedBits):
    """RMSprop with 32-bit state."""

    state_bits = 32
