"""LLM.int8(): codes of rows and of columns (docs/SPEC.md section 4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode import MAGNITUDE_BITS, is_usable
from .launch import TILE, launch, tile_of_program, tiles

ROUNDING = tl.constexpr(1.5 * 2.0**23)
"""Added to an f32 below 2^22 and subtracted again, it leaves the nearest integer, ties to even."""

ROWS = 2
COLUMNS = 64
"""That one program takes; so many columns that it reads whole stretches of memory."""

ENTRIES = 2**10
"""That one program has in work at once."""


@triton.jit(do_not_specialize=["lines"])
def int8_absmax_kernel(
    A, stats, outlier_mask, lines, length, line_stride, stride, threshold, LINES: tl.constexpr, LENGTH: tl.constexpr
):
    """The scale of each line, a row or a column of A, from what lies below the threshold (NaN: everything does).

    outlier_mask, if it is given, is set at each entry's place in its line where that entry does not.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    largest = tl.zeros([LINES], tl.int32)
    for first in range(0, length, LENGTH):
        entry = first + tl.arange(0, LENGTH).to(tl.int64)
        inside = (line < lines)[:, None] & (entry < length)[None, :]
        place = line[:, None] * line_stride + entry[None, :] * stride
        values = tl.load(A + place, mask=inside, other=0.0).to(tl.float32)
        outlier = tl.abs(values) >= threshold
        if outlier_mask is not None:
            column = tl.broadcast_to(entry[None, :], [LINES, LENGTH])
            tl.store(outlier_mask + column, tl.full([LINES, LENGTH], 1, tl.uint8), mask=inside & outlier)
        # As integers, magnitudes are ordered with NaN above infinity.
        bits = values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS
        largest = tl.maximum(largest, tl.max(tl.where(outlier, 0, bits), axis=1))
    absmax = largest.to(tl.float32, bitcast=True)
    # A line too small for its scale to be finite is one of zeros.
    stored = tl.where(tl.div_rn(127.0, absmax) == float("inf"), 0.0, absmax)
    tl.store(stats + line, stored, mask=line < lines)


@triton.jit(do_not_specialize=["lines"])
def int8_quantize_kernel(
    A,
    stats,
    outlier_mask,
    q,
    lines,
    length,
    line_stride,
    stride,
    MASK_OF_LINES: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The codes of a tile by the scales of its lines, and 0 where outlier_mask is set for the line or the entry."""
    line, entry = tile_of_program(length, LINES, LENGTH)
    inside = (line < lines)[:, None] & (entry < length)[None, :]
    place = line[:, None] * line_stride + entry[None, :] * stride
    values = tl.load(A + place, mask=inside, other=0.0).to(tl.float32)
    absmax = tl.load(stats + line, mask=line < lines, other=0.0)
    usable = is_usable(absmax)
    scale = tl.div_rn(127.0, tl.where(usable, absmax, 1.0))
    coded = inside & usable[:, None]
    if outlier_mask is not None:
        if MASK_OF_LINES:
            coded = coded & (tl.load(outlier_mask + line, mask=line < lines, other=0) == 0)[:, None]
        else:
            coded = coded & (tl.load(outlier_mask + entry, mask=entry < length, other=0) == 0)[None, :]
    rounded = tl.where(coded, values * scale[:, None], 0.0) + ROUNDING - ROUNDING
    tl.store(q + place, rounded.to(tl.int8), mask=inside)


@triton.jit
def int8_vectorwise_dequant_kernel(q, stats, out, n, K, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < n
    values = tl.load(q + index, mask=inside, other=0).to(tl.float32)
    scales = tl.load(stats + index // K, mask=inside, other=0.0)
    tl.store(out + index, tl.div_rn(values * scales, 127.0).to(out.dtype.element_ty), mask=inside)


class _Lines(NamedTuple):
    """The rows or the columns of a matrix, and the tile of them for one program."""

    lines: int
    length: int
    line_stride: int
    stride: int
    tile_lines: int

    @classmethod
    def rows_of(cls, A: Tensor, rows: int) -> _Lines:
        return cls(rows, A.shape[-1], A.shape[-1], 1, ROWS)

    @classmethod
    def columns_of(cls, A: Tensor, rows: int) -> _Lines:
        return cls(A.shape[-1], rows, 1, A.shape[-1], COLUMNS)

    def find_scales(self, A: Tensor, threshold: float, stats: Tensor, outlier_mask: Tensor | None) -> None:
        limit = threshold if threshold > 0 else math.nan
        programs = triton.cdiv(self.lines, self.tile_lines)
        launch(int8_absmax_kernel, programs, A, stats, outlier_mask, *self._strides, limit, **self._tile)

    def quantize(self, A: Tensor, stats: Tensor, outlier_mask: Tensor | None, mask_of_lines: bool, q: Tensor) -> None:
        programs = tiles(self.lines, self.length, *self._tile.values())
        arguments = (A, stats, outlier_mask, q, *self._strides)
        launch(int8_quantize_kernel, programs, *arguments, MASK_OF_LINES=mask_of_lines, **self._tile)

    @property
    def _strides(self) -> tuple[int, int, int, int]:
        return self.lines, self.length, self.line_stride, self.stride

    @property
    def _tile(self) -> dict[str, int]:
        return {"LINES": self.tile_lines, "LENGTH": ENTRIES // self.tile_lines}


def int8_vectorwise_quant(A: Tensor, threshold: float, out: tuple[Tensor, Tensor, Tensor]) -> None:
    q, row_stats, outlier_mask = out
    rows = _Lines.rows_of(A, row_stats.numel())
    mask = outlier_mask.zero_().view(torch.uint8) if threshold > 0 else None
    rows.find_scales(A, threshold, row_stats, mask)
    rows.quantize(A, row_stats, mask, False, q)


def int8_double_quant(A: Tensor, threshold: float, out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    q_row, q_col, row_stats, col_stats, outlier_mask = out
    int8_vectorwise_quant(A, threshold, (q_row, row_stats, outlier_mask))
    columns = _Lines.columns_of(A, row_stats.numel())
    columns.find_scales(A, threshold, col_stats, None)
    columns.quantize(A, col_stats, outlier_mask.view(torch.uint8) if threshold > 0 else None, True, q_col)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor, out: Tensor) -> None:
    """Rounded once to the dtype of ``out``: f32, or that of a matmul."""
    n = A.numel()
    launch(int8_vectorwise_dequant_kernel, triton.cdiv(n, TILE), A, stats, out, n, A.shape[-1], TILE=TILE)
