"""The checks of what a user sets on an optimizer. Errors name the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _at_least_zero(value: Any) -> bool:
    return bool(value >= 0)


def _is_horizon(value: Any) -> bool:
    return value is None or bool(value > 0)


_ACCEPTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0", _at_least_zero),
    "betas": ("numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)),
    "eps": ("a number >= 0", _at_least_zero),
    "weight_decay": ("a number >= 0", _at_least_zero),
    "alpha": ("a number >= 0", _at_least_zero),
    "t_alpha": ("None or a number of steps > 0", _is_horizon),
    "t_beta3": ("None or a number of steps > 0", _is_horizon),
    "optim_bits": ("8 or 32", lambda bits: bits in (8, 32)),
    "min_8bit_size": ("a number of elements >= 0", _at_least_zero),
    "max_unorm": ("a number >= 0", _at_least_zero),
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
            raise ValueError(f"{name}: expected {accepted}, got {config[name]!r}")


def _holds(is_accepted: Callable[[Any], bool], value: Any) -> bool:
    try:
        return is_accepted(value)
    except TypeError:
        return False


def check_only(name: str, given: Any, accepted: Any) -> None:
    """For arguments that an optimizer has in its signature but can honour with one value only."""
    if given != accepted:
        raise ValueError(f"{name}: only {accepted!r} is supported, got {given!r}")
