"""Products in which no row depends on the others, from kernels that choose their order of sums by the number of rows.

A kernel is called for a few rows at a time, for numbers of rows that it treats alike (``Kernel.rows_alike``). This is
what :func:`bnb_core.batch_invariant` has serve (docs/SPEC.md section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnb_core.checks import check_offsets

ANY_NUMBER = 2**62
ONE_ROW = (1, 1)
"""What every kernel treats alike: one row at a time."""

RowsAlike = Callable[..., tuple[int, int]]
"""Of a primitive's arguments: least and most rows of calls that give a row the same bits, whatever rows are beside it.

Fewer rows than the least are filled up with zeros. Of int8_mixed_scaled_mm, the bits may not depend either on columns
of outliers in which a row has zeros.
"""


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]; columns may be 0, for which view(-1, columns) is ambiguous."""
    return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _passes(rows: int, most: int) -> Iterator[slice]:
    return (slice(first, min(first + most, rows)) for first in range(0, rows, most))


def _call(kernel: Any, A: Tensor, least: int, others: tuple[Any, ...], out: Tensor) -> None:
    """A kernel's call for these rows, of which there are ``least`` or zeros behind them."""
    if len(A) >= least:
        kernel.function(A, *others, out=out)
        return
    filled = out.new_empty(least, out.shape[1])
    kernel.function(pad(A, (0, 0, 0, least - len(A))), *others, out=filled)
    out.copy_(filled[: len(A)])


def _rows_alike(kernel: Any, *arguments: Any) -> tuple[int, int]:
    return ONE_ROW if kernel.rows_alike is None else kernel.rows_alike(*arguments)


def _product(kernel: Any, A: Tensor, *others: Any, out: Tensor) -> None:
    least, most = _rows_alike(kernel, A, *others)
    rows, results = as_matrix(A), as_matrix(out)
    for part in _passes(len(rows), most):
        _call(kernel, rows[part], least, others, results[part])


def _grouped_product(kernel: Any, A: Tensor, B: Any, offsets: Tensor, *bias: Any, out: Tensor) -> None:
    """Rows in their order, with the borders of groups moved to where each pass has them."""
    if offsets.device.type == "cpu":
        check_offsets(offsets, len(A))
    least, most = _rows_alike(kernel, A, B, offsets, *bias)
    for part in _passes(len(A), most):
        count = part.stop - part.start
        within = (offsets - part.start).clamp(0, count)
        if count < least:
            within[-1] = least  # the rows that fill up belong to the last group
        _call(kernel, A[part], least, (B, within, *bias), out[part])


def _quantized_rows(kernel: Any, A: Tensor, threshold: float, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Each row without its own outliers; the mask has the columns of all of them."""
    if threshold == 0:
        kernel.function(A, threshold, out=out)
        return
    outliers = A.float().abs() >= threshold
    codes, row_stats, mask = out
    kernel.function(A.masked_fill(outliers, 0.0), 0.0, out=(codes, row_stats, mask[:0]))
    mask.copy_(as_matrix(outliers).any(dim=0))


def _mixed_product(kernel: Any, A: Tensor, CA: Any, CB: Any, outlier_mask: Tensor, bias: Any, out: Tensor) -> None:
    """Each row's own outliers, the entries of the columns whose codes do not stand for them, among zeros."""
    least, most = _rows_alike(kernel, A, CA, CB, outlier_mask, bias)
    rows, codes, row_stats, results = as_matrix(A), as_matrix(CA.codes), CA.row_stats.view(-1), as_matrix(out)
    unrounded = rows.float().abs() * (torch.full_like(row_stats, 127.0) / row_stats)[:, None]
    own = outlier_mask.view(-1) & (codes == 0) & (unrounded > 0.5)
    rows = rows.masked_fill(~own, 0.0)
    for part in _passes(len(rows), most):
        missing = max(0, least - (part.stop - part.start))
        of_rows = CA._replace(codes=pad(codes[part], (0, 0, 0, missing)), row_stats=pad(row_stats[part], (0, missing)))
        _call(kernel, rows[part], least, (of_rows, CB, own[part].any(dim=0), bias), results[part])


_BY_PRIMITIVE: dict[str, Callable[..., None]] = {
    "gemm_4bit": _product,
    "gemm_4bit_backward": _product,
    "grouped_gemm_4bit": _grouped_product,
    "grouped_gemm_4bit_backward": _grouped_product,
    "int8_vectorwise_quant": _quantized_rows,
    "int8_mixed_scaled_mm": _mixed_product,
}
"""The other primitives of products are exact in integers: their rows are independent as they are."""


def batch_invariant_function(primitive: str, kernel: Any) -> Callable[..., None]:
    """The function of a kernel of the registry, such that no row of what it gives depends on the others."""
    passes = _BY_PRIMITIVE.get(primitive)
    return kernel.function if passes is None else partial(passes, kernel)
