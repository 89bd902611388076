"""The step of an optimizer, with state in f32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnb_core.checks import (
    F32_MAX,
    FLOAT_DTYPES,
    I64_MAX,
    check_choice,
    check_code,
    check_dtype,
    check_flag,
    check_float,
    check_number,
    check_numel,
    check_shape,
    check_whole,
    shown,
)
from bnb_core.primitive import primitive
from bnb_core.primitives.shapes import block_count
from bnb_core.records import OptimizerState8bit, OptimizerState32bit, OptimizerStep

OPTIMIZER_BLOCKSIZE = 256


class OptimizerTraits(NamedTuple):
    """What state an optimizer keeps, and whether its update can be bounded.

    ``states`` tensors; state1 may stack two moments or be a divisor; ``max_unorm`` may not apply.
    """

    states: int
    stacked: bool = False
    divides_by_state1: bool = False
    takes_max_unorm: bool = True


OPTIMIZERS = {
    "adam": OptimizerTraits(2),
    "lamb": OptimizerTraits(2),
    "ademamix": OptimizerTraits(2, stacked=True, takes_max_unorm=False),
    "momentum": OptimizerTraits(1),
    "lars": OptimizerTraits(1),
    "lion": OptimizerTraits(1),
    "rmsprop": OptimizerTraits(1, divides_by_state1=True),
    "adagrad": OptimizerTraits(1, divides_by_state1=True, takes_max_unorm=False),
}


def _check_optimizer(
    step: OptimizerStep,
    g: Tensor,
    p: Tensor,
    states: tuple[Tensor, Tensor | None],
    state_dtype: torch.dtype,
    unorm_vec: Tensor | None,
) -> None:
    _check_step(step)
    traits = OPTIMIZERS[step.optimizer_name]
    state1, state2 = states
    check_float("p", p)
    check_dtype("g", g, (p.dtype,))
    check_shape("g", g, p.shape)
    check_dtype("state1", state1, (state_dtype,))
    check_shape("state1", state1, (2, *p.shape) if traits.stacked else p.shape)
    if traits.states == 2:
        check_dtype("state2", state2, (state_dtype,))  # type: ignore[arg-type]
        check_shape("state2", state2, p.shape)  # type: ignore[arg-type]
    else:
        _check_absent("state2", state2, step.optimizer_name)
    if step.max_unorm > 0 or unorm_vec is not None:
        check_dtype("unorm_vec", unorm_vec, (torch.float32,))  # type: ignore[arg-type]
        check_shape("unorm_vec", unorm_vec, (1,))  # type: ignore[arg-type]


def _check_step(settings: OptimizerStep) -> None:
    """Each value is looked at quickly first: a step of an optimizer does so for every group of parameters."""
    name, step, lr, *numbers, max_unorm, skip_zeros, t_alpha, t_beta3, step_tensor, lr_tensor = settings
    check_choice("optimizer_name", name, _OPTIMIZER_NAMES)
    if type(step) is not int or not 1 <= step <= I64_MAX:
        check_whole("step", step, minimum=1)
    if type(max_unorm) is not float or not 0.0 <= max_unorm <= F32_MAX:
        check_number("max_unorm", max_unorm, minimum=0.0)
    for number in numbers:
        if type(number) is not float or not -F32_MAX <= number <= F32_MAX:
            _check_numbers(numbers)
    if type(lr) is not float or not -F32_MAX <= lr <= F32_MAX:
        check_number("lr", _one_number("lr", lr))
    if skip_zeros is not True and skip_zeros is not False:
        check_flag("skip_zeros", skip_zeros)
    if type(t_alpha) is not float or t_alpha != 0.0:
        check_number("t_alpha", t_alpha, minimum=0.0)
    if type(t_beta3) is not float or t_beta3 != 0.0:
        check_number("t_beta3", t_beta3, minimum=0.0)
    if step_tensor is not None:
        _check_number_tensor("step_tensor", step_tensor)
    if lr_tensor is not None:
        _check_number_tensor("lr_tensor", lr_tensor)
    if max_unorm > 0 and not OPTIMIZERS[name].takes_max_unorm:
        raise ValueError(f"max_unorm: {name} has no bounded update, expected 0, got {max_unorm}")


_OPTIMIZER_NAMES = tuple(OPTIMIZERS)
_NUMBERS = OptimizerStep._fields[3 : OptimizerStep._fields.index("max_unorm")]


def _check_numbers(numbers: Sequence[float]) -> None:
    for name, number in zip(_NUMBERS, numbers, strict=True):
        check_number(name, number)


def _check_number_tensor(name: str, tensor: Tensor) -> None:
    """Its value is not looked at: that would wait for the device."""
    check_dtype(name, tensor, (torch.float64,))
    check_numel(name, tensor, 1)


def _check_absent(name: str, value: object, optimizer_name: str) -> None:
    if value is not None:
        raise ValueError(f"{name}: {optimizer_name} has one state, expected None, got {shown(value)}")


def _one_number(name: str, value: object) -> object:
    """The number in a tensor of one element, as learning rates may be; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    check_dtype(name, value, (*FLOAT_DTYPES, torch.float64))
    check_numel(name, value, 1)
    if value.is_meta:
        raise ValueError(f"{name}: expected a number, got a tensor on meta, which has none")
    return value.item()


@primitive(
    "(OptimizerStep step, Tensor g, Tensor(a!) p, OptimizerState32bit state, Tensor(f!)? unorm_vec) -> ()",
)
def optimizer_update_32bit(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState32bit, unorm_vec: Tensor | None
) -> None:
    """One optimizer step with f32 state, in place (docs/SPEC.md section 5 has the rule of each optimizer).

    Args:
        g, p: gradient and parameter of one shape and dtype: f32, f16 or bf16. p and the state are updated.
        unorm_vec: f32[1], receives the norm of the update when ``max_unorm`` > 0; otherwise may be None.
    """
    _check_optimizer(step, g, p, (state.state1, state.state2), torch.float32, unorm_vec)


@primitive(
    "(OptimizerStep step, Tensor g, Tensor(a!) p, OptimizerState8bit state, Tensor(f!)? unorm_vec) -> ()",
)
def optimizer_update_8bit_blockwise(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState8bit, unorm_vec: Tensor | None
) -> None:
    """One optimizer step with 8-bit state in blocks of 256, in place (8-bit Optimizers; docs/SPEC.md section 5).

    The arguments are those of :data:`optimizer_update_32bit`.
    """
    _check_optimizer(step, g, p, (state.state1, state.state2), torch.uint8, unorm_vec)
    traits = OPTIMIZERS[step.optimizer_name]
    blocks = block_count(p.numel(), OPTIMIZER_BLOCKSIZE)
    check_code("qmap1", state.qmap1)
    check_dtype("absmax1", state.absmax1, (torch.float32,))
    check_numel("absmax1", state.absmax1, 2 * blocks if traits.stacked else blocks)
    if traits.states == 2:
        check_code("qmap2", state.qmap2)  # type: ignore[arg-type]
        check_dtype("absmax2", state.absmax2, (torch.float32,))  # type: ignore[arg-type]
        check_numel("absmax2", state.absmax2, blocks)  # type: ignore[arg-type]
    else:
        _check_absent("qmap2", state.qmap2, step.optimizer_name)
        _check_absent("absmax2", state.absmax2, step.optimizer_name)
