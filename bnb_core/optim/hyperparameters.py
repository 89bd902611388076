"""The checks of what a user sets on an optimizer. Errors name the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bnb_core.checks import F32_MAX, check_dense, shown


def _at_least_zero(value: Any) -> bool:
    return isinstance(value, Real) and bool(0 <= value <= F32_MAX)  # type: ignore[operator]


def _is_learning_rate(value: Any) -> bool:
    """Also a tensor of one number, as torch's optimizers take it."""
    if not isinstance(value, Tensor):
        return _at_least_zero(value)
    check_dense("lr", value)
    return value.numel() == 1 and not value.is_complex() and _at_least_zero(value.item())


def check_lr_tensor(lr: Tensor) -> None:
    """A learning rate on a device. Its value is not looked at: that would wait for the device.

    Raises:
        ValueError: the tensor is no dense one of one floating-point number.
    """
    if lr.layout is not torch.strided or lr.is_nested or lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(f"lr: expected a number, or a tensor of one, got {shown(lr)} of {lr.dtype}, {tuple(lr.shape)}")


def _are_betas(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(beta, Real) and 0 <= beta < 1 for beta in value)  # type: ignore[operator]


def _is_horizon(value: Any) -> bool:
    return value is None or (_at_least_zero(value) and value > 0)


_ACCEPTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0 that f32 holds", _is_learning_rate),
    "betas": ("numbers in [0, 1)", _are_betas),
    "eps": ("a number >= 0 that f32 holds", _at_least_zero),
    "weight_decay": ("a number >= 0 that f32 holds", _at_least_zero),
    "alpha": ("a number >= 0 that f32 holds", _at_least_zero),
    "t_alpha": ("None or a number of steps > 0", _is_horizon),
    "t_beta3": ("None or a number of steps > 0", _is_horizon),
    "optim_bits": ("8 or 32", lambda bits: isinstance(bits, Real) and bits in (8, 32)),
    "min_8bit_size": ("a number of elements >= 0", lambda size: isinstance(size, Real) and size >= 0),  # type: ignore[operator]
    "max_unorm": ("a number >= 0 that f32 holds", _at_least_zero),
    "skip_zeros": ("True or False", lambda value: isinstance(value, bool)),
}
HYPERPARAMETERS = tuple(_ACCEPTED)


def check_hyperparameters(config: Mapping[str, Any]) -> None:
    """Check those entries of ``config`` that are hyperparameters.

    Raises:
        ValueError: a value out of its range or of the wrong kind.
    """
    for name, (accepted, is_accepted) in _ACCEPTED.items():
        if name in config and not _holds(is_accepted, config[name]):
            raise ValueError(f"{name}: expected {accepted}, got {shown(config[name])}")


def _holds(is_accepted: Callable[[Any], bool], value: Any) -> bool:
    try:
        return is_accepted(value)
    except (TypeError, RuntimeError):  # of a tensor that has no value
        return False


def check_only(name: str, given: Any, accepted: Any) -> None:
    """For arguments that an optimizer has in its signature but can honour with one value only."""
    if isinstance(given, Tensor) or given != accepted:
        raise ValueError(f"{name}: only {accepted!r} is supported, got {shown(given)}")
