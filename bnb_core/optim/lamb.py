"""LAMB (arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bnb_core.optim.hyperparameters import check_only
from bnb_core.optim.optimizer import Optimizer2State


class LAMB(Optimizer2State):
    """LAMB: Adam whose update is limited by the parameter's norm (arXiv 1904.00962).

    Args:
        lr: step size.
        bias_correction: True only.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient; a step takes ``lr * weight_decay`` of the parameter.
        amsgrad: False only.
        adam_w_mode: True only.
        max_unorm: the update's norm is at most this multiple of the parameter's; a parameter of zeros stays zero.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        capturable: bool = False,
    ) -> None:
        check_only("bias_correction", bias_correction, True)
        check_only("amsgrad", amsgrad, False)
        check_only("adam_w_mode", adam_w_mode, True)
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            capturable=capturable,
        )


class LAMBOfFixedBits(LAMB):
    """The base of those classes that have the bits in their name: they do not take them as an argument."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode,
            args=args, min_8bit_size=min_8bit_size, max_unorm=max_unorm, capturable=capturable,
        )  # fmt: skip


class LAMB8bit(LAMBOfFixedBits):
    """LAMB with 8-bit state."""

    state_bits = 8


class LAMB32bit(LAMBOfFixedBits):
    """LAMB with 32-bit state."""

    state_bits = 32
