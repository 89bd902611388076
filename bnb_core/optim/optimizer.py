"""The bases of optimizers with one state and with two, ours and others': they run the rule of a given name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from bnb_core.checks import check_choice
from bnb_core.optim.base import MockArgs, Optimizer8bit
from bnb_core.optim.manager import GlobalOptimManager
from bnb_core.primitives import OPTIMIZERS
from bnb_core.utils import sync_gpu

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit", "sync_gpu"]


class Optimizer1State(Optimizer8bit):
    """The base of optimizers that remember one tensor, which runs their rule (docs/SPEC.md section 5) by its name.

    Optimizers of others derive from it and override ``step``, :meth:`init_state` or :meth:`update_step`.

    Args:
        optimizer_name: ``momentum``, ``lars``, ``lion``, ``rmsprop`` or ``adagrad``.
        lr, betas, eps, weight_decay: those of the rule.

    The other settings are described at :class:`Optimizer8bit`.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        self.optimizer_name = _checked_name(optimizer_name, states=1)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        max_unorm, skip_zeros = _without_older_arguments(max_unorm, skip_zeros)
        super().__init__(
            params, defaults, optim_bits, is_paged, args, min_8bit_size, max_unorm, skip_zeros, capturable=capturable
        )


class Optimizer2State(Optimizer8bit):
    """The base of optimizers that remember two tensors; otherwise as :class:`Optimizer1State`.

    Args:
        optimizer_name: ``adam``, ``lamb`` or ``ademamix``.
        alpha, t_alpha, t_beta3: those of AdEMAMix, for which ``betas`` are three; other rules have no use for them.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        capturable: bool = False,
    ) -> None:
        self.optimizer_name = _checked_name(optimizer_name, states=2)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if OPTIMIZERS[optimizer_name].stacked:
            defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        max_unorm, skip_zeros = _without_older_arguments(max_unorm, skip_zeros)
        super().__init__(
            params, defaults, optim_bits, is_paged, args, min_8bit_size, max_unorm, skip_zeros, capturable=capturable
        )


def _checked_name(optimizer_name: str, states: int) -> str:
    check_choice("optimizer_name", optimizer_name, [name for name in OPTIMIZERS if OPTIMIZERS[name].states == states])
    return optimizer_name


def _without_older_arguments(max_unorm: float, skip_zeros: bool) -> tuple[float, bool]:
    """What was given, unless it is ``percentile_clipping=100, block_wise=True``, as older bitsandbytes had them here.

    They meant no clipping, and state in blocks; GaLore's optimizers still give them.
    """
    if type(max_unorm) is not int or (max_unorm, skip_zeros) != (100, True):
        return max_unorm, skip_zeros
    warnings.warn(
        "max_unorm=100 with skip_zeros=True is taken for percentile_clipping=100 with block_wise=True, as older "
        "bitsandbytes had them in this place, and changes nothing; if it is meant, give max_unorm=100.0",
        stacklevel=4,
    )
    return 0.0, False
