"""The state dicts of optimizers: grouped when written, grouped or flat when read, and checked before anything is kept.

The key names and tensor shapes are those that bitsandbytes writes, so that its runs resume here and ours there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from bnb_core.checkpoint_entries import checked_entry, dense_entry, described
from bnb_core.optim.per_element import expected_per_element
from bnb_core.primitives import OPTIMIZER_BLOCKSIZE, OPTIMIZERS, block_count

# Sharded training gathers tensors in the state by the parameter's shape; in a nested dict it leaves them alone.
QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"
STATE_KEYS = ("state1", "state2")
TENSOR_KEYS = frozenset({*STATE_KEYS, "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec"})
MOST_STEPS = 2**53
"""Whole numbers up to here are exact as doubles, in which kernels raise the betas to them."""
GROUPED_KEYS = TENSOR_KEYS - {"unorm_vec"}


class ParameterState(dict[str, Any]):
    """A parameter's state, flat. Iterating over it gives the names of the saved form.

    torch.distributed.checkpoint looks for each of those names in a state dict that it has flattened.
    """

    def __iter__(self) -> Iterator[str]:
        if "absmax1" not in self:
            return super().__iter__()
        return iter([*(key for key in self.keys() if key not in GROUPED_KEYS), QUANT_STATE_KEY])

    def __missing__(self, key: str) -> dict[str, Any]:
        if key != QUANT_STATE_KEY or "absmax1" not in self:
            raise KeyError(key)
        return {name: value for name, value in self.items() if name in GROUPED_KEYS}


def grouped(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as saved: its quantized tensors, if it has any, in a dict of their own."""
    # Detaching drops Python attributes, such as is_paged, which do not hold for the tensor that will be loaded.
    result = {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}
    if "absmax1" in result:
        result[QUANT_STATE_KEY] = {key: result.pop(key) for key in state.keys() if key in GROUPED_KEYS}  # noqa: SIM118
    return result


def flat(name: str, saved: object) -> dict[str, Any]:
    """Undo :func:`grouped`; flat state comes back as it is. ``name`` is what errors call it."""
    state = dict(_mapping(name, saved))
    for key, value in _mapping(f"{name}[{QUANT_STATE_KEY!r}]", state.pop(QUANT_STATE_KEY, {})).items():
        if key in state:
            raise ValueError(f"{name}[{key!r}]: given twice, in {QUANT_STATE_KEY!r} and beside it; expected it once")
        state[key] = value
    return state


def checked_groups(
    saved_groups: list[Any], own_groups: list[dict[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The saved parameter groups' settings with our parameters; missing settings come from ``defaults``."""
    if len(saved_groups) != len(own_groups):
        raise ValueError(f"param_groups: expected {len(own_groups)} groups, got {len(saved_groups)}")
    groups = []
    for index, (saved, own) in enumerate(zip(saved_groups, own_groups, strict=True)):
        params = _mapping(f"param_groups[{index}]", saved).get("params")
        if not isinstance(params, list) or len(params) != len(own["params"]):
            raise ValueError(
                f"param_groups[{index}]['params']: expected {len(own['params'])} parameters, got {_size(params)}"
            )
        kept = {key: own[key] for key in ("param_names",) if key in own}
        settings = {key: deepcopy(value) for key, value in saved.items() if key != "params"}
        groups.append({**defaults, **kept, **settings, "params": own["params"]})
    return groups


def checked_state(name: str, saved: object, optimizer_name: str, p: Tensor, stateless: bool) -> dict[str, Any]:
    """One parameter's saved state, flat, its step an int; the tensors are still those of the state dict.

    They are in blocks or, as FSDP1 has them, per element (:mod:`bnb_core.optim.per_element`).

    Args:
        name: what errors call it.
        stateless: the optimizer may do without tensors for this parameter (momentum 0).

    Raises:
        ValueError: a missing or unknown key, or an entry of the wrong type, dtype or shape.
    """
    state = flat(name, saved)
    if not state:
        return {}
    state["step"] = _checked_step(f"{name}['step']", state)
    expected = expected_per_element(state, optimizer_name, p)
    if expected is None:
        expected = {} if stateless and "state1" not in state else _expected_tensors(name, state, optimizer_name, p)
    if "unorm_vec" in state:
        expected["unorm_vec"] = (torch.float32, (1,))
    for key, (dtype, shape) in expected.items():
        state[key] = checked_entry(f"{name}[{key!r}]", state.get(key), (dtype,), shape)
    for key in state:
        if key != "step" and key not in expected:
            raise ValueError(f"{name}[{key!r}]: unexpected key, expected {', '.join(['step', *expected])}")
    for key in ("qmap1", "qmap2"):
        if key in state and not bool((state[key].diff() >= 0).all()):
            raise ValueError(f"{name}[{key!r}]: expected ascending values")
    return state


def _expected_tensors(
    name: str, state: Mapping[str, Any], optimizer_name: str, p: Tensor
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of the state, 8-bit or 32-bit as its state1 is."""
    traits = OPTIMIZERS[optimizer_name]
    state1 = state.get("state1")
    dtype = state1.dtype if isinstance(state1, Tensor) else torch.float32
    if dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"{name}['state1']: expected dtype uint8 or float32, got {dtype}")
    expected = {}
    for number in range(1, traits.states + 1):
        stack = (2,) if traits.stacked and number == 1 else ()
        expected[f"state{number}"] = (dtype, (*stack, *p.shape))
        if dtype == torch.uint8:
            blocks = block_count(p.numel(), OPTIMIZER_BLOCKSIZE)
            expected[f"qmap{number}"] = (torch.float32, (256,))
            expected[f"absmax{number}"] = (torch.float32, (*stack, blocks))
    return expected


def _checked_step(name: str, state: Mapping[str, Any]) -> int:
    step = state.get("step")
    if isinstance(step, Tensor):
        step = dense_entry(name, step)
        if step.numel() != 1:
            raise ValueError(f"{name}: expected one number, got {described(step)}")
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step <= MOST_STEPS or step != int(step):
        raise ValueError(f"{name}: expected a whole number from 0 to 2**53, got {shown(step)}")
    return int(step)


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a dict, got {_size(value)}")
    return value


def _size(value: object) -> str:
    if value is None:
        return "nothing"
    return f"{len(value)}" if isinstance(value, list) else type(value).__name__
