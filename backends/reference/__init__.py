"""The definition of every primitive in plain torch, written for the reader. It runs on any device that torch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bnb_core.backend import Backend

from . import gemm_4bit, grouped, int8, optimizer, quantize


def _filling_outputs(definition: Callable[..., Any]) -> Callable[..., None]:
    """The kernel of a definition that returns its results."""

    def kernel(*arguments: Any, out: Any) -> None:
        with torch.no_grad():
            results = definition(*arguments)
            outputs = out if isinstance(out, tuple) else (out,)
            for output, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=True):
                output.copy_(result)

    return kernel


_RETURNING = (
    quantize.quantize_blockwise,
    quantize.dequantize_blockwise,
    quantize.quantize_4bit,
    quantize.dequantize_4bit,
    gemm_4bit.gemm_4bit,
    gemm_4bit.gemm_4bit_backward,
    grouped.grouped_gemm_4bit,
    grouped.grouped_gemm_4bit_backward,
    int8.int8_vectorwise_quant,
    int8.int8_double_quant,
    int8.int8_vectorwise_dequant,
    int8.int8_linear_matmul,
    int8.int8_mm_dequant,
    int8.int8_scaled_mm,
    int8.int8_mixed_scaled_mm,
    int8.int8_linear_backward,
)
_IN_PLACE = (optimizer.optimizer_update_32bit, optimizer.optimizer_update_8bit_blockwise)

backend = Backend(
    name="reference",
    device_types=("*",),
    priority=0,
    kernels={
        **{definition.__name__: _filling_outputs(definition) for definition in _RETURNING},
        **{definition.__name__: torch.no_grad()(definition) for definition in _IN_PLACE},
    },
)
