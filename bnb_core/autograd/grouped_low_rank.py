"""Low-rank products for each group of rows, as adapters of experts have them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def grouped_low_rank(x: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
    """``(x[m] @ A[e]^T) @ B[e]^T`` for the rows m of each group e; differentiable in x, A and B.

    Nothing is kept for the backward but x, what is between the products, and A and B themselves.

    Args:
        x: [T, K]: the rows of group 0, then those of group 1, and so on.
        A: [E, r, K] in x's dtype.
        B: [E, N, r] in x's dtype.
        offsets: i32[E + 1], ascending from 0 to T.

    Returns:
        [T, N] in x's dtype.
    """
    return _LowRank.apply(x, A, B, offsets)


def _rows_by(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """``x[m] @ weights[e]``."""
    if _is_served(x, weights.shape[1], weights.shape[2]):
        return torch.nn.functional.grouped_mm(x.contiguous(), weights.contiguous(), offs=offsets[1:])
    result = x.new_zeros(x.shape[0], weights.shape[2])
    for e, (start, end) in enumerate(_borders(offsets)):
        if start != end:
            torch.mm(x[start:end], weights[e], out=result[start:end])
    return result


def _sums_by(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """``x[rows of e]^T @ y[rows of e]`` for each e, [E, ...]."""
    result = x.new_zeros(len(offsets) - 1, x.shape[1], y.shape[1])
    for e, (start, end) in enumerate(_borders(offsets)):
        if start != end:
            torch.mm(x[start:end].t(), y[start:end], out=result[e])
    return result


def _borders(offsets: Tensor) -> list[tuple[int, int]]:
    values = offsets.tolist()
    return list(pairwise(values))


def _is_served(x: Tensor, rows: int, columns: int) -> bool:
    """Whether torch has one call for it: it wants rows of whole 16 bytes, and on GPUs bf16."""
    aligned = all(size * x.element_size() % 16 == 0 for size in (x.shape[1], rows, columns))
    dtypes = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    return hasattr(torch.nn.functional, "grouped_mm") and aligned and x.dtype in dtypes and x.shape[0] > 0


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
        between = _rows_by(x, A.transpose(1, 2), offsets)
        ctx.save_for_backward(x, A, B, between, offsets)
        return _rows_by(between, B.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, between, offsets = ctx.saved_tensors
        dY, needed = gradients[0].contiguous(), ctx.needs_input_grad
        d_between = _rows_by(dY, B, offsets)
        dx = _rows_by(d_between, A, offsets) if needed[0] else None
        dA = _sums_by(d_between, x, offsets) if needed[1] else None
        return dx, dA, _sums_by(dY, between, offsets) if needed[2] else None, None
