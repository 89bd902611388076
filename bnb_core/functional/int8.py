"""Rows quantized to int8, and products of int8 matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.checks import check_dimensions, check_dtype, check_flag, check_shape, check_tensor, shown
from bnb_core.functional.arguments import dtype_of, filled


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row of A [..., K] to int8 (LLM.int8(), section 3).

    Returns:
        codes i8 in A's shape; row_stats f32[rows]; the outlier columns, i64 ascending, None when threshold is 0.
    """
    check_tensor("A", A)
    q, row_stats, outlier_mask = primitives.int8_vectorwise_quant(A, threshold)
    return q, row_stats, outlier_mask.nonzero().view(-1) if threshold > 0 else None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """``A * stats / 127`` by rows: A i8[..., K], stats f32. Result f32."""
    return primitives.int8_vectorwise_dequant(A, stats)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize A [..., K] to int8 by rows and by columns at once; the optional tensors receive the results.

    Returns:
        codes by row, codes by column, row_stats, col_stats, outlier columns (None when threshold is 0).
    """
    check_tensor("A", A)
    outputs = {"out_row": out_row, "out_col": out_col, "row_stats": row_stats, "col_stats": col_stats}
    if all(output is None for output in outputs.values()):
        *results, outlier_mask = primitives.int8_double_quant(A, threshold)
    else:
        *results, outlier_mask = filled(primitives.int8_double_quant, (A, threshold), **outputs, outlier_mask=None)
    return (*results, outlier_mask.nonzero().view(-1) if threshold > 0 else None)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """``A @ B^T`` in i32, exact: A i8[..., K], B i8[N, K]."""
    if dtype is not torch.int32:
        raise ValueError(f"dtype: expected torch.int32, got {shown(dtype)}")
    return primitives.int8_linear_matmul(A, B, out=out)


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A * row_stats * col_stats / 127^2 + bias`` of A i32[..., N], in the dtype of out, else of bias, else f16."""
    dtype = dtype_of("out", out, dtype_of("bias", bias, torch.float16))
    return primitives.int8_mm_dequant(A, row_stats, col_stats, bias, dtype, out=out)


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """``A @ B`` of int8 matrices in i32, exact: A [M, K] (transposed_A: [K, M]), B [K, N] (transposed_B: [N, K])."""
    _check_factors(A, B, 2, transposed_A, transposed_B)
    return primitives.int8_linear_matmul(A.t() if transposed_A else A, B if transposed_B else B.t(), out=out)


def _check_factors(A: Tensor, B: Tensor, dimensions: int, transposed_A: bool, transposed_B: bool) -> None:
    for name, tensor in (("A", A), ("B", B)):
        check_dtype(name, tensor, (torch.int8,))
        check_dimensions(name, tensor, dimensions)
    check_flag("transposed_A", transposed_A)
    check_flag("transposed_B", transposed_B)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """:func:`igemm` over the leading dimension of two 3-D tensors."""
    _check_factors(A, B, 3, transposed_A, transposed_B)
    A, B = (A.mT if transposed_A else A), (B if transposed_B else B.mT)
    if A.shape[0] != B.shape[0] or A.shape[2] != B.shape[2]:
        raise ValueError(
            f"B: expected a batch of {A.shape[0]} and an inner size of {A.shape[2]} like A, "
            f"got {B.shape[0]} and {B.shape[2]}"
        )
    shape = (A.shape[0], A.shape[1], B.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=A.device)
    check_dtype("out", out, (torch.int32,))
    check_shape("out", out, shape)
    for a, b, result in zip(A, B, out, strict=True):
        primitives.int8_linear_matmul(a, b, out=result)
    return out
