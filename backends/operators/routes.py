"""How a primitive is served by the operators of bitsandbytes: arguments there and results back.

A primitive has one or several routes, the most direct first. Each begins with an operator that must have a kernel; what
else it needs is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnb_core.codebooks import get_4bit_type
from bnb_core.primitive import aligned
from bnb_core.primitives import NESTED_BLOCKSIZE

from ..dequantized import LEAST_TERMS, as_matrix
from ..reference.int8 import int8_mm_dequant
from ..reference.quantize import dequantize_blockwise
from ..torch_precision import exact_matmuls


@dataclass(frozen=True)
class Route:
    """``call(operator, *arguments)`` gives the primitive's results; ``refuses(*arguments)`` says why it cannot."""

    operator: str
    call: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None


def _same(operator: Any, *arguments: Any) -> Any:
    """The primitive and the operator have the same arguments and results."""
    return operator(*arguments)


def _f32_scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    if nested_absmax is None or nested_code is None or offset is None:
        return absmax
    return dequantize_blockwise(absmax, nested_absmax, nested_code, nested_blocksize, torch.float32) + offset


def _dequantize_4bit(
    operator: Any,
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *nested: Any,
) -> Tensor:
    return operator(A, _f32_scales(absmax, *nested), blocksize, quant_type, shape, dtype)


def _gemm_4bit(
    operator: Any,
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """The operator takes double-quantized scales in blocks of 256 alone."""
    if nested_absmax is not None and nested_blocksize == NESTED_BLOCKSIZE:
        return operator(A, B, shape, nested_absmax, blocksize, quant_type, bias, absmax, nested_code, offset)
    scales = _f32_scales(absmax, nested_absmax, nested_code, offset, nested_blocksize)
    return operator(A, B, shape, scales, blocksize, quant_type, bias)


def _gemv_4bit(
    operator: Any,
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    *nested: Any,
) -> Tensor:
    result = operator(A, B, shape, absmax, get_4bit_type(quant_type, A.device), blocksize)
    return result if bias is None else result + bias


def _refuses_gemv_4bit(
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    *nested: Any,
) -> str | None:
    if A.numel() != A.shape[-1]:
        return "bitsandbytes::gemv_4bit takes one row"
    return None if nested_absmax is None else "bitsandbytes::gemv_4bit takes no double-quantized scales"


def _product(A: Tensor, B: Tensor) -> Tensor:
    """In f32."""
    with exact_matmuls(A.device, torch.float32):
        return aligned(A.float()) @ B.float()


def _weight(operator: Any, dtype: torch.dtype, terms: int, B: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    """A 4-bit weight in full, rounded to the input's dtype where the sums over it are long."""
    absmax, blocksize, quant_type, *nested = rest
    weight_dtype = dtype if terms >= LEAST_TERMS else torch.float32
    return _dequantize_4bit(operator, B, absmax, blocksize, quant_type, shape, weight_dtype, *nested)


def _gemm_by_dequantizing(
    operator: Any,
    A: Tensor,
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    *nested: Any,
) -> Tensor:
    weight = _weight(operator, A.dtype, shape[1], B, shape, absmax, blocksize, quant_type, *nested)
    result = _product(A, weight.t())
    return (result if bias is None else result + bias.float()).to(A.dtype)


def _gemm_4bit_backward(operator: Any, dY: Tensor, B: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    return _product(dY, _weight(operator, dY.dtype, shape[0], B, shape, *rest)).to(dY.dtype)


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


def _int8_scaled_mm(operator: Any, A: Tensor, *arguments: Any) -> Tensor:
    return operator(as_matrix(A), *arguments)


def _scaled_by_matmul(operator: Any, A: Tensor, B: Tensor, *scales: Any) -> Tensor:
    return int8_mm_dequant(operator(as_matrix(A), B), *scales)


def _int8_mixed_scaled_mm(
    operator: Any,
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    outlier_mask: Tensor,
    bias: Tensor | None,
) -> Tensor:
    columns = outlier_mask.nonzero().view(-1)
    return operator(as_matrix(A), as_matrix(CA), CB, row_stats, col_stats, columns, bias)[0]


def _mixed_by(scaled_mm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product without outliers by an operator, theirs by torch."""

    def call(
        operator: Any,
        A: Tensor,
        CA: Tensor,
        CB: Tensor,
        row_stats: Tensor,
        col_stats: Tensor,
        outlier_mask: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        columns = outlier_mask.nonzero().view(-1)
        bias = None if bias is None else bias.float()
        inner = scaled_mm(operator, CA, CB, row_stats, col_stats, bias, torch.float32)
        weight = CB[:, columns].float() * (col_stats.view(-1, 1) / 127.0)
        return (inner + _product(as_matrix(A)[:, columns], weight.t())).to(A.dtype)

    return call


def _optimizer_update_32bit(
    operator: Any,
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    weight_decay: float,
    gnorm_scale: float,
    max_unorm: float,
    skip_zeros: bool,
) -> None:
    param_norm = torch.where(p.isfinite(), p, 0.0).float().norm().item() if max_unorm > 0 else 0.0
    operator(
        optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps,
        weight_decay, step, lr, gnorm_scale, skip_zeros,
    )  # fmt: skip


def _optimizer_update_8bit(
    operator: Any,
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    unorm_vec: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    weight_decay: float,
    gnorm_scale: float,
    max_unorm: float,
    skip_zeros: bool,
) -> None:
    operator(
        optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1,
        absmax2, weight_decay, gnorm_scale, skip_zeros,
    )  # fmt: skip


def _refuses_max_unorm(*arguments: Any) -> str | None:
    max_unorm = arguments[-2]
    return "bitsandbytes::optimizer_update_8bit_blockwise has no max_unorm" if max_unorm > 0 else None


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
    "optimizer_update_32bit": (Route("optimizer_update_32bit", _optimizer_update_32bit),),
    "optimizer_update_8bit_blockwise": (
        Route("optimizer_update_8bit_blockwise", _optimizer_update_8bit, _refuses_max_unorm),
    ),
}
