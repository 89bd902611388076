"""``bitsandbytes.backends.utils``: the 4-bit codebooks, and whether Triton is there."""

from __future__ import annotations

from importlib.util import find_spec

from bnb_core.checks import QUANT_TYPES
from bnb_core.codebooks import get_4bit_type

__all__ = ["CODE", "triton_available"]

CODE = {quant_type: get_4bit_type(quant_type) for quant_type in QUANT_TYPES}
triton_available = find_spec("triton") is not None
