"""``bitsandbytes.nn.modules``: all of ``nn``, and what its callers find beside it there."""

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
    "fix_4bit_weight_quant_state_from_module",
]
