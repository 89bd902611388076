"""LLM.int8(): quantization by rows, and products."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core.checks import (
    check_dimensions,
    check_dtype,
    check_dtype_argument,
    check_float,
    check_number,
    check_numel,
    check_shape,
)
from bnb_core.primitive import Out, primitive
from bnb_core.primitives.shapes import check_columns, check_rows
from bnb_core.records import Int8Rows, Int8Weight

MAX_INT8_INNER_SIZE = 2**16


@primitive("(Tensor A, float threshold) -> (Tensor, Tensor, Tensor)")
def int8_vectorwise_quant(A: Tensor, threshold: float) -> tuple[Out, Out, Out]:
    """Quantize each row to int8 by its absmax, setting outlier columns aside (LLM.int8(), section 3).

    Args:
        A: [..., K], f32, f16 or bf16.
        threshold: entries with |a| >= threshold are outliers; 0 for none.

    Returns:
        codes i8 in A's shape, row_stats f32[rows], outlier_mask bool[K] (empty when threshold is 0).
    """
    check_float("A", A)
    check_number("threshold", threshold, minimum=0.0)
    rows, columns = check_rows("A", A)
    return (
        Out(A.shape, torch.int8),
        Out((rows,), torch.float32),
        Out((columns if threshold > 0 else 0,), torch.bool),
    )


@primitive("(Tensor A, float threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def int8_double_quant(A: Tensor, threshold: float) -> tuple[Out, Out, Out, Out, Out]:
    """Quantize to int8 by rows and by columns at once.

    Args:
        A: [..., K], f32, f16 or bf16, read as [rows, K].
        threshold: as in :data:`int8_vectorwise_quant`; outlier columns are zero in both results.

    Returns:
        codes by row and codes by column, i8 in A's shape; row_stats f32[rows], col_stats f32[K],
        outlier_mask bool[K] (empty when threshold is 0).
    """
    q_row, row_stats, outlier_mask = int8_vectorwise_quant.declaration(A, threshold)  # type: ignore[misc]
    return q_row, q_row, row_stats, Out((A.shape[-1],), torch.float32), outlier_mask  # type: ignore[return-value]


@primitive("(Tensor A, Tensor stats) -> Tensor")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Out:
    """``A * stats / 127`` in f32: A i8[..., K], stats f32, one per row."""
    check_dtype("A", A, (torch.int8,))
    rows, _ = check_rows("A", A)
    check_dtype("stats", stats, (torch.float32,))
    check_numel("stats", stats, rows)
    return Out(A.shape, torch.float32)


def _check_int8_operands(A: Tensor, B: Tensor, names: tuple[str, str] = ("A", "B")) -> tuple[int, int]:
    """(rows of A, rows of B) of i8[..., K] and i8[N, K]."""
    check_dtype(names[0], A, (torch.int8,))
    check_dtype(names[1], B, (torch.int8,))
    rows, K = check_rows(names[0], A)
    check_dimensions(names[1], B, 2)
    if B.shape[1] != K:
        raise ValueError(f"{names[1]}: expected {K} columns like {names[0]}, got shape {tuple(B.shape)}")
    if K > MAX_INT8_INNER_SIZE:
        limit = f"at most {MAX_INT8_INNER_SIZE} columns, of which i32 holds the sums"
        raise ValueError(f"{names[0]}: expected {limit}, got {K}")
    return rows, B.shape[0]


@primitive("(Tensor A, Tensor B) -> Tensor")
def int8_linear_matmul(A: Tensor, B: Tensor) -> Out:
    """``A @ B^T``, exact: A i8[..., K], B i8[N, K], result i32[..., N]; K up to 2^16."""
    _, N = _check_int8_operands(A, B)
    return Out((*A.shape[:-1], N), torch.int32)


def _check_scales(
    row_stats: Tensor, col_stats: Tensor, rows: int, N: int, bias: Tensor | None, dtype: torch.dtype
) -> None:
    check_dtype_argument("dtype", dtype)
    check_dtype("row_stats", row_stats, (torch.float32,))
    check_numel("row_stats", row_stats, rows)
    check_dtype("col_stats", col_stats, (torch.float32,))
    check_numel("col_stats", col_stats, N)
    if bias is not None:
        check_dtype("bias", bias, (dtype,))
        check_shape("bias", bias, (N,))


@primitive("(Tensor A, Tensor row_stats, Tensor col_stats, Tensor? bias, ScalarType dtype) -> Tensor")
def int8_mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Out:
    """``A * row_stats * col_stats / 127^2 + bias`` in f32, rounded once to ``dtype``.

    Args:
        A: i32[..., N], the result of :data:`int8_linear_matmul`.
        row_stats: f32, one per row. col_stats: f32[N].
        bias: ``dtype[N]``, or None.
    """
    check_dtype("A", A, (torch.int32,))
    rows, N = check_rows("A", A)
    _check_scales(row_stats, col_stats, rows, N, bias, dtype)
    return Out(A.shape, dtype)


@primitive("(Int8Rows A, Int8Weight B, Tensor? bias, ScalarType dtype) -> Tensor")
def int8_scaled_mm(A: Int8Rows, B: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> Out:
    """:data:`int8_linear_matmul`, then :data:`int8_mm_dequant`, in one: A [..., K], B [N, K] → dtype[..., N]."""
    rows, N = _check_int8_operands(A.codes, B.codes)
    _check_scales(A.row_stats, B.col_stats, rows, N, bias, dtype)
    return Out((*A.codes.shape[:-1], N), dtype)


@primitive("(Tensor A, Int8Rows CA, Int8Weight CB, Tensor outlier_mask, Tensor? bias) -> Tensor")
def int8_mixed_scaled_mm(A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None) -> Out:
    """:data:`int8_scaled_mm` plus ``A[:, outliers] @ dequantized(CB[:, outliers])^T`` (LLM.int8(), section 3.2).

    Args:
        A: [..., K], f32, f16 or bf16; the result has its dtype.
        CA, outlier_mask: of A, from :data:`int8_vectorwise_quant`.
        CB: the weight [N, K].
        bias: [N] in A's dtype, or None.
    """
    check_float("A", A)
    rows, N = _check_int8_operands(CA.codes, CB.codes, ("CA", "CB"))
    check_shape("CA", CA.codes, A.shape)
    check_dtype("outlier_mask", outlier_mask, (torch.bool,))
    check_numel("outlier_mask", outlier_mask, A.shape[-1])
    _check_scales(CA.row_stats, CB.col_stats, rows, N, bias, A.dtype)
    return Out((*A.shape[:-1], N), A.dtype)


@primitive("(Tensor dY, Int8Weight B) -> Tensor", differentiable=True)
def int8_linear_backward(dY: Tensor, B: Int8Weight) -> Out:
    """The gradient of A in a linear layer with an int8 weight: ``dY @ (B * col_stats / 127)`` in dY's dtype.

    Args:
        dY: [..., N], f32, f16 or bf16.
        B: the weight [N, K].
    """
    check_float("dY", dY)
    check_dtype("B", B.codes, (torch.int8,))
    check_dimensions("B", B.codes, 2)
    N, K = B.codes.shape
    check_dtype("col_stats", B.col_stats, (torch.float32,))
    check_numel("col_stats", B.col_stats, N)
    check_columns("dY", dY, N, B.codes.shape)
    return Out((*dY.shape[:-1], K), dY.dtype)
