"""LLM.int8() (docs/SPEC.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core.records import Int8Rows, Int8Weight

from .matmul import product

# Products of two i8 are at most 2^14, so sums over this many columns are exact in f32.
EXACT_COLUMNS_IN_F32 = 2**10


def _quantize_rows(rows: Tensor, outliers: Tensor, outlier_columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """i8 codes and f32 scale of each row; a row whose scale is zero or not finite gives zeros."""
    absmax = rows.abs().masked_fill(outliers, 0.0).amax(dim=1)
    # A scalar over a tensor would be torch's reciprocal and a product: two roundings.
    scale = torch.full_like(absmax, 127.0) / absmax
    # A row too small for its scale to be finite is a zero row.
    absmax = torch.where(scale.isinf(), 0.0, absmax)
    usable = (absmax > 0) & absmax.isfinite()
    codes = torch.where(usable[:, None], rows * scale[:, None], 0.0)
    codes = codes.masked_fill(outliers, 0.0)
    if outlier_columns is not None:
        codes = codes.masked_fill(outlier_columns, 0.0)
    return codes.round().clamp(-127, 127).to(torch.int8), absmax


def _rows_and_outliers(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = A.reshape(-1, A.shape[-1]).float()
    outliers = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    return rows, outliers, outliers.any(dim=0)


def int8_vectorwise_quant(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    q, _, row_stats, _, outlier_mask = int8_double_quant(A, threshold)
    return q, row_stats, outlier_mask


def int8_double_quant(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if A.numel() == 0:
        M, K = A.shape[:-1].numel(), A.shape[-1]
        q, mask = torch.zeros_like(A, dtype=torch.int8), A.new_zeros(K if threshold > 0 else 0, dtype=torch.bool)
        return q, q, A.new_zeros(M, dtype=torch.float32), A.new_zeros(K, dtype=torch.float32), mask
    rows, outliers, outlier_columns = _rows_and_outliers(A, threshold)
    q_row, row_stats = _quantize_rows(rows, outliers, outlier_columns)
    q_col, col_stats = _quantize_rows(rows.t(), outliers.t(), outlier_columns[:, None])
    mask = outlier_columns if threshold > 0 else outlier_columns[:0]
    return q_row.view(A.shape), q_col.t().reshape(A.shape), row_stats, col_stats, mask


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    rows = A.reshape(-1, A.shape[-1]) if A.numel() else A
    return (rows * stats.view(-1, *[1] * (rows.dim() - 1)) / 127.0).view(A.shape) if A.numel() else A.float()


def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """Exact in i32, in f32 matmuls over few enough columns that each is exact: torch has no i8 matmul everywhere."""
    rows = A.reshape(-1, A.shape[-1]).float() if A.numel() else A.new_zeros((A.shape[:-1].numel(), A.shape[-1])).float()
    total = torch.zeros((rows.shape[0], B.shape[0]), dtype=torch.int32, device=A.device)
    for columns, weight in zip(
        rows.split(EXACT_COLUMNS_IN_F32, dim=1), B.float().split(EXACT_COLUMNS_IN_F32, dim=1), strict=True
    ):
        total += (columns @ weight.t()).to(torch.int32)
    return total.view(*A.shape[:-1], B.shape[0])


def int8_mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _dequantize(A, row_stats, col_stats, bias).to(dtype)


def _dequantize(A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None) -> Tensor:
    """Dividing first keeps values near the end of f32's range from overflowing on the way."""
    out = A.float() * (row_stats.view(*A.shape[:-1], 1) / (127.0 * 127.0)) * col_stats.view(-1)
    return out if bias is None else out + bias.float()


def int8_scaled_mm(A: Int8Rows, B: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return int8_mm_dequant(int8_linear_matmul(A.codes, B.codes), A.row_stats, B.col_stats, bias, dtype)


def int8_mixed_scaled_mm(A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None) -> Tensor:
    columns = outlier_mask.nonzero().view(-1)
    out = _dequantize(int8_linear_matmul(CA.codes, CB.codes), CA.row_stats, CB.col_stats, bias)
    return (out + product(A[..., columns], outlier_weight(CB, columns).t())).to(A.dtype)


def outlier_weight(CB: Int8Weight, columns: Tensor) -> Tensor:
    """f32[N, columns]."""
    return CB.codes[:, columns].float() * (CB.col_stats.view(-1, 1) / 127.0)


def int8_linear_backward(dY: Tensor, B: Int8Weight) -> Tensor:
    return product(dY, int8_vectorwise_dequant(*B)).to(dY.dtype)
