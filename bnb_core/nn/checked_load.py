"""Loading a whole model from a state dict, or nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bnb_core.nn.parametrize import Bnb4bitParametrization
from bnb_core.nn.quantized_weight import QuantizedWeightMixin


def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """``module.load_state_dict``, with every entry checked before the first parameter changes.

    torch loads module by module, so that a malformed layer is found when those before it are already replaced. Here an
    error leaves the whole model as it was. Checking takes the time of a second load and the memory of one layer.

    Args:
        module: with quantized layers or without.
        state_dict, strict, assign: as of torch's.

    Returns:
        The missing and the unexpected keys.

    Raises:
        ValueError, RuntimeError: what torch's ``load_state_dict`` would raise.
    """
    quant_states = {m: m.quant_state for m in module.modules() if isinstance(m, Bnb4bitParametrization)}
    try:
        _to_check(module, {}).load_state_dict(state_dict, strict=strict, assign=True)
    finally:
        # The hooks of a parametrized module are bound to it, whichever copy of it loads.
        for parametrization, quant_state in quant_states.items():
            parametrization.quant_state = quant_state
    return module.load_state_dict(state_dict, strict=strict, assign=assign)


def _to_check(module: nn.Module, copied: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy that may be loaded and thrown away: plain parameters are without data, quantized ones are not replaced."""
    if module in copied:
        return copied[module]
    result = copied[module] = type(module).__new__(type(module))  # torch lets no parametrized module be copied
    result.__dict__ = dict(module.__dict__)
    if isinstance(module, QuantizedWeightMixin):
        result.__dict__["_only_checks"] = True
        result._parameters = dict(module._parameters)
    else:
        result._parameters = {
            name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            for name, p in module._parameters.items()
        }
    result._buffers = dict(module._buffers)
    result._modules = {
        name: None if child is None else _to_check(child, copied) for name, child in module._modules.items()
    }
    return result
