"""How a primitive is served by the operators of bitsandbytes: arguments there and results back.

A primitive has one or several routes, the most direct first. Each begins with an operator that must have a kernel; what
else it needs is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnb_core.codebooks import get_4bit_type
from bnb_core.records import (
    NESTED_BLOCKSIZE,
    Int8Rows,
    Int8Weight,
    OptimizerState8bit,
    OptimizerState32bit,
    OptimizerStep,
    Weight4bit,
)
from bnb_core.step_numbers import at_hand, scheduled

from ..dequantized import LEAST_TERMS, as_matrix
from ..reference.int8 import int8_mm_dequant, outlier_weight
from ..reference.matmul import product
from ..reference.quantize import block_scales


@dataclass(frozen=True)
class Route:
    """``call(operator, *arguments)`` gives the primitive's results; ``refuses(*arguments)`` says why it cannot."""

    operator: str
    call: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None


def _same(operator: Any, *arguments: Any) -> Any:
    """The primitive and the operator have the same arguments and results."""
    return operator(*arguments)


def _dequantize_4bit(operator: Any, A: Weight4bit, dtype: torch.dtype) -> Tensor:
    return operator(A.packed, block_scales(A), A.blocksize, A.quant_type, A.shape, dtype)


def _gemm_4bit(operator: Any, A: Tensor, B: Weight4bit, bias: Tensor | None) -> Tensor:
    """The operator takes double-quantized scales in blocks of 256 alone."""
    weight = (B.packed, B.shape)
    if B.nested_absmax is not None and B.nested_blocksize == NESTED_BLOCKSIZE:
        nested = (B.absmax, B.nested_code, B.offset)
        return operator(A, *weight, B.nested_absmax, B.blocksize, B.quant_type, bias, *nested)
    return operator(A, *weight, block_scales(B), B.blocksize, B.quant_type, bias)


def _gemv_4bit(operator: Any, A: Tensor, B: Weight4bit, bias: Tensor | None) -> Tensor:
    result = operator(A, B.packed, B.shape, B.absmax, get_4bit_type(B.quant_type, A.device), B.blocksize)
    return result if bias is None else result + bias


def _refuses_gemv_4bit(A: Tensor, B: Weight4bit, bias: Tensor | None) -> str | None:
    if A.numel() != A.shape[-1]:
        return "bitsandbytes::gemv_4bit takes one row"
    return None if B.nested_absmax is None else "bitsandbytes::gemv_4bit takes no double-quantized scales"


def _weight(operator: Any, B: Weight4bit, dtype: torch.dtype, terms: int) -> Tensor:
    """A 4-bit weight in full, rounded to the input's dtype where the sums over it are long."""
    return _dequantize_4bit(operator, B, dtype if terms >= LEAST_TERMS else torch.float32)


def _gemm_by_dequantizing(operator: Any, A: Tensor, B: Weight4bit, bias: Tensor | None) -> Tensor:
    result = product(A, _weight(operator, B, A.dtype, terms=B.shape[1]).t())
    return (result if bias is None else result + bias.float()).to(A.dtype)


def _gemm_4bit_backward(operator: Any, dY: Tensor, B: Weight4bit) -> Tensor:
    return product(dY, _weight(operator, B, dY.dtype, terms=B.shape[0])).to(dY.dtype)


def _mask(A: Tensor, threshold: float, columns: Tensor | None) -> Tensor:
    """The primitives' mask of outlier columns from the operators' indices."""
    mask = torch.zeros(A.shape[-1] if threshold > 0 else 0, dtype=torch.bool, device=A.device)
    return mask if columns is None else mask.index_fill_(0, columns, True)


def _int8_quant(operator: Any, A: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """By rows, or by rows and columns. The operators are asked for matrices, as are those below."""
    *results, columns = operator(as_matrix(A), threshold)
    return (*results, _mask(A, threshold, columns))


def _on_rows(operator: Any, A: Tensor, other: Tensor) -> Tensor:
    return operator(as_matrix(A), other)


def _int8_mm_dequant(
    operator: Any, A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return operator(as_matrix(A), row_stats, col_stats, dtype, bias)


def _int8_scaled_mm(operator: Any, A: Int8Rows, B: Int8Weight, *others: Any) -> Tensor:
    return operator(as_matrix(A.codes), B.codes, A.row_stats, B.col_stats, *others)


def _scaled_by_matmul(operator: Any, A: Int8Rows, B: Int8Weight, *others: Any) -> Tensor:
    return int8_mm_dequant(operator(as_matrix(A.codes), B.codes), A.row_stats, B.col_stats, *others)


def _int8_mixed_scaled_mm(
    operator: Any, A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None
) -> Tensor:
    columns = outlier_mask.nonzero().view(-1)
    scales = CA.row_stats, CB.col_stats
    return operator(as_matrix(A), as_matrix(CA.codes), CB.codes, *scales, columns, bias)[0]


def _mixed_by(scaled_mm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product without outliers by an operator, theirs by torch."""

    def call(
        operator: Any, A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None
    ) -> Tensor:
        columns = outlier_mask.nonzero().view(-1)
        bias = None if bias is None else bias.float()
        inner = scaled_mm(operator, CA, CB, bias, torch.float32)
        weight = outlier_weight(CB, columns)
        return (inner + product(as_matrix(A)[:, columns], weight.t())).to(A.dtype)

    return call


def _int8_linear_backward(operator: Any, dY: Tensor, B: Int8Weight) -> Tensor:
    return product(dY, operator(*B)).to(dY.dtype)


def _optimizer_update_32bit(
    operator: Any, step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState32bit, unorm_vec: Tensor | None
) -> None:
    step = scheduled(at_hand(step))
    param_norm = torch.where(p.isfinite(), p, 0.0).float().norm().item() if step.max_unorm > 0 else 0.0
    operator(
        step.optimizer_name, g, p, *state, unorm_vec, step.max_unorm, param_norm, step.beta1, step.beta2, step.beta3,
        step.alpha, step.eps, step.weight_decay, step.step, step.lr, step.gnorm_scale, step.skip_zeros,
    )  # fmt: skip


def _optimizer_update_8bit(
    operator: Any, step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState8bit, unorm_vec: Tensor | None
) -> None:
    step = scheduled(at_hand(step))
    state1, state2, *scales = state
    operator(
        step.optimizer_name, g, p, state1, state2, step.beta1, step.beta2, step.beta3, step.alpha, step.eps,
        step.step, step.lr, *scales, step.weight_decay, step.gnorm_scale, step.skip_zeros,
    )  # fmt: skip


def _refuses_max_unorm(step: OptimizerStep, *tensors: Any) -> str | None:
    return "bitsandbytes::optimizer_update_8bit_blockwise has no max_unorm" if step.max_unorm > 0 else None


ROUTES: dict[str, tuple[Route, ...]] = {
    "quantize_blockwise": (Route("quantize_blockwise", _same),),
    "dequantize_blockwise": (Route("dequantize_blockwise", _same),),
    "quantize_4bit": (Route("quantize_4bit", _same),),
    "dequantize_4bit": (Route("dequantize_4bit", _dequantize_4bit),),
    "gemm_4bit": (
        Route("gemm_4bit", _gemm_4bit),
        Route("gemv_4bit", _gemv_4bit, _refuses_gemv_4bit),
        Route("dequantize_4bit", _gemm_by_dequantizing),
    ),
    "gemm_4bit_backward": (Route("dequantize_4bit", _gemm_4bit_backward),),
    "int8_vectorwise_quant": (Route("int8_vectorwise_quant", _int8_quant),),
    "int8_double_quant": (Route("int8_double_quant", _int8_quant),),
    "int8_vectorwise_dequant": (Route("int8_vectorwise_dequant", _on_rows),),
    "int8_linear_matmul": (Route("int8_linear_matmul", _on_rows),),
    "int8_mm_dequant": (Route("int8_mm_dequant", _int8_mm_dequant),),
    "int8_scaled_mm": (
        Route("int8_scaled_mm", _int8_scaled_mm),
        Route("int8_linear_matmul", _scaled_by_matmul),
    ),
    "int8_mixed_scaled_mm": (
        Route("int8_mixed_scaled_mm", _int8_mixed_scaled_mm),
        Route("int8_scaled_mm", _mixed_by(_int8_scaled_mm)),
        Route("int8_linear_matmul", _mixed_by(_scaled_by_matmul)),
    ),
    "int8_linear_backward": (Route("int8_vectorwise_dequant", _int8_linear_backward),),
    "optimizer_update_32bit": (Route("optimizer_update_32bit", _optimizer_update_32bit),),
    "optimizer_update_8bit_blockwise": (
        Route("optimizer_update_8bit_blockwise", _optimizer_update_8bit, _refuses_max_unorm),
    ),
}
