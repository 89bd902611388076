"""The functions of the API. They keep the ecosystem's signatures and call the primitives."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from bnb_core.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from bnb_core.functional.blockwise import (
    dequantize_4bit,
    dequantize_absmax,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    quantize_4bit,
    quantize_absmax,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)
from bnb_core.functional.int8 import (
    batched_igemm,
    igemm,
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from bnb_core.functional.memory import get_paged, get_ptr, is_on_gpu, prefetch_tensor
from bnb_core.functional.optimizers import optimizer_update_8bit_blockwise, optimizer_update_32bit
from bnb_core.functional.products import gemm_4bit, gemv_4bit
from bnb_core.quant_state import QuantState
from bnb_core.serialization import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "QuantState",
    "batched_igemm",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemm_4bit",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]


further_names: Callable[[], ModuleType] | None = None
"""Gives a module with more names, in its ``__all__``, when they are first asked for: hardly anybody does."""


def __getattr__(name: str) -> Any:
    if further_names is not None and not name.startswith("__"):
        module = further_names()
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
