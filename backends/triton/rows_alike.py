"""For which numbers of rows the kernels here have one tile (gemm_4bit.py), and so one order of sums."""

from __future__ import annotations

from torch import Tensor

from bnb_core.records import Weight4bit
from bnb_core.row_passes import ANY_NUMBER, RowsAlike

from .gemm_4bit import FUSED_ROWS
from .launch import SMALLEST_DOT


def _grouped(A: Tensor, B: Weight4bit, offsets: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """The tile goes by the rows that a group has on average."""
    groups = B.shape[0]
    return 2 * groups, SMALLEST_DOT * groups


ROWS_ALIKE: dict[str, RowsAlike] = {
    "gemm_4bit": lambda A, B, bias: (SMALLEST_DOT + 1, FUSED_ROWS),
    "grouped_gemm_4bit": _grouped,
    "grouped_gemm_4bit_backward": lambda dY, B, offsets: (1, ANY_NUMBER),
    "int8_mixed_scaled_mm": lambda A, CA, CB, outlier_mask, bias: (1, ANY_NUMBER),
}
