"""What a GPU's kernels leave to torch: products large enough for its dense matmul.

All GPU backends share it, compiled and Triton's; those over csrc_cuda only say where their module and streams are.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from bnb_core.primitive import aligned
from bnb_core.records import Int8Rows, Int8Weight, Weight4bit
from bnb_core.row_passes import ANY_NUMBER, RowsAlike, as_matrix

from .dequantized import DenseProducts

INT_MM_ROWS = 17
INT_MM_MULTIPLE = 8
INT_MM_ALIGNMENT = 16
"""What torch._int_mm takes on a GPU: at least 17 rows, multiples of 8 in the other two sizes, and operands at addresses
that are multiples of 16, which cuBLASLt presumes without a check."""

ROWS_ALIKE = 64
"""Which kernel serves a product goes by a table of numbers of rows, so that one number has one kernel: the largest that
has kernels on tensor cores everywhere."""


def _grouped_rows(A: Tensor, B: Weight4bit, offsets: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """csrc_cuda/grouped_gemm_4bit.cu chooses by the rows that a group has on average; its few rows are 4 in f32."""
    return 1, 4 * B.shape[0]


COMPILED_ROWS_ALIKE: dict[str, RowsAlike] = {
    "gemm_4bit": lambda A, B, bias: (ROWS_ALIKE, ROWS_ALIKE),
    "grouped_gemm_4bit": _grouped_rows,
    "grouped_gemm_4bit_backward": lambda dY, B, offsets: (1, ANY_NUMBER),
    "int8_mixed_scaled_mm": lambda A, CA, CB, outlier_mask, bias: (1, ANY_NUMBER),
}
"""Of the kernels in csrc_cuda."""


class LargeProducts(DenseProducts):
    """The primitives of a GPU, with torch's matmuls where they are faster."""

    def gemm_4bit(self, A: Tensor, B: Weight4bit, bias: Tensor | None, out: Tensor) -> None:
        super().gemm_4bit(aligned(A), B, bias, out)

    def int8_linear_matmul(self, A: Tensor, B: Tensor, out: Tensor) -> None:
        if _int_mm_takes(A, B):
            torch._int_mm(as_matrix(A), B.t(), out=as_matrix(out))
        else:
            self.fused.int8_linear_matmul(A, B, out)

    def int8_scaled_mm(self, A: Int8Rows, B: Int8Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor) -> None:
        if not _int_mm_takes(A.codes, B.codes):
            self.fused.int8_scaled_mm(A, B, bias, dtype, out)
            return
        product = torch._int_mm(as_matrix(A.codes), B.codes.t())
        self.int8_mm_dequant(product, A.row_stats, B.col_stats, bias, dtype, out)


class GpuKernels(LargeProducts):
    """The primitives over a module of csrc_cuda: ``fused`` are NativeKernels."""

    def int8_mixed_scaled_mm(
        self, A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        takes = _int_mm_takes(CA.codes, CB.codes)
        products = torch._int_mm(as_matrix(CA.codes), CB.codes.t()) if takes else None
        stream = self.fused.stream(A.device)
        self.fused.module.int8_mixed_scaled_mm((CA, CB, products), (A, outlier_mask), bias, out, stream)


def _int_mm_takes(A: Tensor, B: Tensor) -> bool:
    N, K = B.shape
    rows = math.prod(A.shape[:-1])
    fits = rows >= INT_MM_ROWS and N % INT_MM_MULTIPLE == 0 and K % INT_MM_MULTIPLE == 0 and N > 0 and K > 0
    aligned = A.data_ptr() % INT_MM_ALIGNMENT == 0 and B.data_ptr() % INT_MM_ALIGNMENT == 0
    return fits and aligned and _has_int_mm(A.device.type)


@cache
def _has_int_mm(device_type: str) -> bool:
    """Whether this torch multiplies int8 there: for Intel's GPUs older ones do not."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_int_mm", device_type.upper())
