"""Any parameter in 4 bits, whatever its shape: it is dequantized when it is read.

For weights that are not an nn.Linear's, such as the 3-D ones of fused experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnb_core import functional
from bnb_core.checkpoint_entries import dense_entry
from bnb_core.checks import FLOAT_DTYPES, check_float
from bnb_core.functional import QuantState
from bnb_core.nn.quantized_weight import CheckpointError


class Bnb4bitParametrization(nn.Module):
    """Dequantizes packed codes with a quant state."""

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return functional.dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn: Any, recurse: bool = True) -> Bnb4bitParametrization:
        """Scales keep their dtype when the module is converted, but follow it to a device."""
        super()._apply(fn, recurse)
        self.quant_state.to(fn(torch.empty(0, device=self.quant_state.absmax.device)).device)
        return self


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter of ``module`` in place; reading ``module.<param_name>`` gives the dequantized tensor.

    Args:
        module: the module that owns the parameter.
        param_name: of the parameter: f32, f16 or bf16, any shape.
        compress_statistics, quant_type, blocksize: as in :func:`bnb_core.functional.quantize_4bit`.

    Raises:
        AttributeError: no such parameter.
        TypeError, ValueError: it is no parameter, or it or an argument cannot be quantized so.
    """
    parameter = _parameter(module, param_name)
    check_float(param_name, parameter)
    packed, quant_state = functional.quantize_4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    _parametrize(module, param_name, packed, quant_state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """Treat a parameter of ``module`` that holds packed codes as quantized, with the quant state of ``qs_dict``.

    Raises:
        AttributeError: no such parameter.
        TypeError: it is no parameter.
        ValueError: a malformed quant state, or codes that do not fit it.
    """
    parameter = _parameter(module, param_name)
    quant_state = QuantState.from_dict(qs_dict, device)
    quant_state.check_packed(param_name, parameter)
    _parametrize(module, param_name, parameter.data.to(device), quant_state)


def _parameter(module: nn.Module, name: str) -> Tensor:
    if not hasattr(module, name):
        raise AttributeError(f"param_name: Module does not have parameter {name!r}; it is a {type(module).__name__}")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(
            f"param_name: Parameter {name!r} is not an instance of nn.Parameter, but a "
            f"{type(parameter).__name__}; give the name of a parameter"
        )
    return parameter


def _parametrize(module: nn.Module, name: str, packed: Tensor, quant_state: QuantState) -> None:
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(quant_state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Have the parameter saved and loaded with its quant state, and dequantized once a forward.

    For callers that parametrize a module themselves.
    """
    module._register_state_dict_hook(partial(_save, name=param_name))
    module._register_load_state_dict_pre_hook(partial(_load, name=param_name), with_module=True)
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _state_key(prefix: str, name: str) -> str:
    return f"{prefix}parametrizations.{name}.original"


def _of(module: nn.Module, name: str) -> Any:
    """torch's list of what parametrizes a parameter; ours is the only one."""
    parametrizations: Any = module.parametrizations
    return parametrizations[name]


def _save(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *, name: str
) -> None:
    """Under the parameter's own name, with its quant state, as a quantized layer's weight is saved."""
    packed = state_dict.pop(_state_key(prefix, name))
    state_dict[prefix + name] = packed
    parametrization = _of(module, name)[0]
    for key, value in parametrization.quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}{name}.{key}"] = value


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any, name: str) -> None:
    try:
        _load_checked(module, state_dict, prefix, name)
    except ValueError as error:
        raise CheckpointError(*error.args) from error


def _load_checked(module: nn.Module, state_dict: dict[str, Any], prefix: str, name: str) -> None:
    """Codes with their quant state, or values, which are quantized alike; all is checked before anything changes."""
    key = prefix + name
    part_keys = [k for k in state_dict if k.startswith(key + ".")]
    if key not in state_dict:
        if part_keys:
            raise ValueError(
                f"{key}: missing, though the state dict has {part_keys[0]}; expected the codes beside their parts"
            )
        return
    parametrization, original = _of(module, name)[0], _of(module, name).original
    present = parametrization.quant_state
    value = dense_entry(key, state_dict[key])
    if part_keys:
        parts = {k: dense_entry(k, state_dict[k]) for k in part_keys}
        packed, quant_state = value, _read_quant_state(key, value, parts, original)
        shape = tuple(quant_state.shape)  # type: ignore[arg-type]
    else:
        shape = tuple(value.shape)
    if shape != tuple(present.shape):
        raise ValueError(f"{key}: expected shape {tuple(present.shape)}, got {shape}")
    if not part_keys:
        packed, quant_state = _quantize_like(key, value, present, original)
    for k in (key, *part_keys):
        del state_dict[k]
    parametrization.quant_state = quant_state
    state_dict[_state_key(prefix, name)] = packed.contiguous().view(torch.uint8).view(original.dtype).view_as(original)


def _read_quant_state(key: str, packed: Tensor, parts: dict[str, Tensor], original: Tensor) -> QuantState:
    try:
        quant_state = QuantState.from_dict(parts, packed.device)
        quant_state.check_packed("the packed codes", packed)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return copy.deepcopy(quant_state).to(original.device)


def _quantize_like(key: str, values: Tensor, present: QuantState, original: Tensor) -> tuple[Tensor, QuantState]:
    if values.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{key}: expected packed codes with their quant state, or values, got {values.dtype} alone")
    return functional.quantize_4bit(
        values.to(original.device),
        blocksize=present.blocksize,
        compress_statistics=present.nested,
        quant_type=str(present.quant_type),
        quant_storage=original.dtype,
    )


def _enable_parametrization_cache(module: nn.Module, inputs: Any) -> None:
    """Within one forward the parameter is dequantized once, however often it is read.

    Axolotl finds this hook and its counterpart by their names.
    """
    parametrize._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    # Where an earlier hook has raised, this one runs although its counterpart has not.
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}
