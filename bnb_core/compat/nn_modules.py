"""``bitsandbytes.nn.modules``: all of ``nn``, and what its callers find beside it there."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from torch import Tensor, nn

from bnb_core.compat.functional_names import has_avx512bf16
from bnb_core.functional import QuantState
from bnb_core.nn import *  # noqa: F403
from bnb_core.nn import __all__ as _nn_names
from bnb_core.nn.linear4bit import fix_4bit_weight_quant_state_from_module
from bnb_core.optim import GlobalOptimManager
from bnb_core.utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer

__all__ = [
    *_nn_names,
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "GlobalOptimManager",
    "OutlierTracer",
    "QuantState",
    "T",
    "fix_4bit_weight_quant_state_from_module",
    "has_avx512bf16",
    "logger",
    "maybe_rearrange_weight",
]

T = TypeVar("T", bound=nn.Module)

logger = logging.getLogger("bnb_core.nn")
"""Where the layers say what is slow or loses precision."""


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A hook before an 8-bit weight is loaded: it takes its ``weight_format`` from the state dict, which must be row.

    The layers here read a state dict as it is, and do without it.

    Raises:
        ValueError: another format, by its key.
    """
    key = f"{prefix}weight_format"
    if f"{prefix}weight" not in state_dict or key not in state_dict:
        return
    value = state_dict.pop(key)
    number: Any = value.item() if isinstance(value, Tensor) else value
    name = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(number, number)
    if name != "row":
        raise ValueError(f"{key}: expected row, got {name}")
