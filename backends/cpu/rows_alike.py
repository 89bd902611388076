"""For which numbers of rows the kernels of csrc_cpu add up in one order, as generic/choice.h chooses among them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bnb_core.records import Weight4bit
from bnb_core.row_passes import ANY_NUMBER, ONE_ROW, RowsAlike

from ..dequantized import LEAST_TERMS

FEW_ROWS = (1, 4)
"""generic/gemv_4bit.h, in f32."""
FEW_ROWS_OF_BF16 = (1, 8)
"""avx512_bf16/gemv_4bit.h."""
TILE_ROWS = (3, 16)
"""amx/gemm_4bit.h, for products; below, f32 serves."""
TILE_STEP = 32
ROWS_WITHOUT_TILES = (1, 2)
"""Of a group that may have any number of them."""
ROWS_WITHOUT_DENSE = (1, 16)
"""generic/backward.h: gradients of more rows are left to torch's matmul."""

OUTLIERS_ONE_BY_ONE = (5, ANY_NUMBER)
"""generic/int8_outliers.h: for fewer rows a vector of them at a time."""


def rows_alike(isa: Callable[[], str]) -> dict[str, RowsAlike]:
    """By primitive; ``isa`` names the instruction set that serves."""

    def product(A: Tensor, B: Weight4bit, tiles: tuple[int, int]) -> tuple[int, int]:
        K = B.shape[-1]
        if A.dtype == torch.bfloat16 and K >= LEAST_TERMS:
            if isa() == "avx512_bf16":
                return FEW_ROWS_OF_BF16
            if isa() == "amx" and K % TILE_STEP == 0:
                return tiles
        return FEW_ROWS

    def gradient(dY: Tensor, most: tuple[int, int]) -> tuple[int, int]:
        return ONE_ROW if isa() == "amx" and dY.dtype == torch.bfloat16 else most

    def mixed(A: Tensor) -> tuple[int, int]:
        return ONE_ROW if isa() == "amx" and A.dtype == torch.bfloat16 else OUTLIERS_ONE_BY_ONE

    return {
        "gemm_4bit": lambda A, B, bias: product(A, B, TILE_ROWS),
        "gemm_4bit_backward": lambda dY, B: gradient(dY, ROWS_WITHOUT_DENSE),
        "grouped_gemm_4bit": lambda A, B, offsets, bias: product(A, B, ROWS_WITHOUT_TILES),
        "grouped_gemm_4bit_backward": lambda dY, B, offsets: gradient(dY, (1, ANY_NUMBER)),
        "int8_mixed_scaled_mm": lambda A, CA, CB, outlier_mask, bias: mixed(A),
    }
