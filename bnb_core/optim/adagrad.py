"""Adagrad (Duchi et al., JMLR 12, 2011)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.hyperparameters import check_only
from bnb_core.optim.optimizer import Optimizer1State


class Adagrad(Optimizer1State):
    """Adagrad (Duchi et al., JMLR 12, 2011).

    Args:
        lr: step size.
        lr_decay: 0 only.
        weight_decay: added to the gradient as ``weight_decay * p``.
        initial_accumulator_value: 0 only.
        eps: added to the root of the sum of squared gradients.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        check_only("lr_decay", lr_decay, 0)
        check_only("initial_accumulator_value", initial_accumulator_value, 0)
        super().__init__(
            "adagrad", params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size, capturable=capturable
        )


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit state; ``optim_bits`` is 8 only."""

    state_bits = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        check_only("optim_bits", optim_bits, 8)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            optim_bits,
            args,
            min_8bit_size,
            capturable=capturable,
        )


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit state."""

    state_bits = 32
