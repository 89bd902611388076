"""What a GPU's kernels leave to torch: products large enough for its dense matmul.

All GPU backends share it, compiled and Triton's; those over csrc_cuda only say where their module and streams are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnb_core.primitive import aligned

from . import dequantized
from .native import DTYPE_CODES, NativeKernels
from .torch_precision import exact_matmuls

FUSED_ROWS = 64
"""Up to so many rows of A the fused kernel multiplies; above, the weight is dequantized for torch's matmul, which reads
it from the cache as often as it needs."""

INT_MM_ROWS = 17
INT_MM_MULTIPLE = 8
INT_MM_ALIGNMENT = 16
"""What torch._int_mm takes on a GPU: at least 17 rows, multiples of 8 in the other two sizes, and operands at addresses
that are multiples of 16, which cuBLASLt presumes without a check."""


class LargeProducts:
    """The primitives of a GPU, with torch's matmuls where they are faster.

    Args:
        fused: the kernels for everything else, a function for each primitive as NativeKernels has them.
    """

    def __init__(self, fused: Any) -> None:
        self.fused = fused

    def __getattr__(self, primitive: str) -> Any:
        return getattr(self.fused, primitive)

    def gemm_4bit(
        self,
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
        out: Tensor,
    ) -> None:
        A = aligned(A)
        scales = (nested_absmax, nested_code, offset, nested_blocksize)
        if not self._is_large(A, B, blocksize):
            self.fused.gemm_4bit(A, B, shape, absmax, blocksize, quant_type, bias, *scales, out)
            return
        weight = torch.empty(tuple(shape), dtype=A.dtype, device=A.device)
        self.dequantize_4bit(B, absmax, blocksize, quant_type, shape, A.dtype, *scales, weight)
        with exact_matmuls(A.device, A.dtype):
            _multiply(A, weight, bias, out)

    def gemm_4bit_backward(
        self,
        dY: Tensor,
        B: Tensor,
        shape: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        offset: Tensor | None,
        nested_blocksize: int,
        out: Tensor,
    ) -> None:
        nested = (nested_absmax, nested_code, offset, nested_blocksize)

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(tuple(shape), dtype=dtype, device=dY.device)

        dequantized.gemm_4bit_backward(self, dY, B, shape, absmax, blocksize, quant_type, *nested, out, empty)

    def most_fused_rows(self, A: Tensor, B: Tensor, blocksize: int) -> int:
        """Up to so many rows of A the fused kernels are faster than torch's matmul, for operands like these."""
        return FUSED_ROWS

    def _is_large(self, A: Tensor, B: Tensor, blocksize: int) -> bool:
        """Whether the product is for torch's matmul: it is large, and torch computes it as exactly as we do."""
        rows = math.prod(A.shape[:-1])
        if rows <= FUSED_ROWS or A.shape[-1] < dequantized.LEAST_TERMS:
            return False
        return rows > self.most_fused_rows(A, B, blocksize)

    def int8_linear_matmul(self, A: Tensor, B: Tensor, out: Tensor) -> None:
        if _int_mm_takes(A, B):
            torch._int_mm(dequantized.as_matrix(A), B.t(), out=dequantized.as_matrix(out))
        else:
            self.fused.int8_linear_matmul(A, B, out)

    def int8_scaled_mm(
        self,
        A: Tensor,
        B: Tensor,
        row_stats: Tensor,
        col_stats: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        out: Tensor,
    ) -> None:
        if not _int_mm_takes(A, B):
            self.fused.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype, out)
            return
        product = torch._int_mm(dequantized.as_matrix(A), B.t())
        self.int8_mm_dequant(product, row_stats, col_stats, bias, dtype, out)


class GpuKernels(LargeProducts):
    """The primitives over a module of csrc_cuda.

    Args:
        module, stream: as for NativeKernels.
        wgmma_rows: up to so many rows of A products are left to the kernel on Hopper's wgmma where it takes them.
    """

    def __init__(self, module: ModuleType, stream: Callable[[torch.device], int], wgmma_rows: int = 0) -> None:
        super().__init__(NativeKernels(module, stream))
        self.wgmma_rows = wgmma_rows

    def most_fused_rows(self, A: Tensor, B: Tensor, blocksize: int) -> int:
        operands = (A, DTYPE_CODES[A.dtype], A.shape[-1], B, blocksize)
        if self.wgmma_rows > FUSED_ROWS and self.fused.module.takes_wgmma(*operands):
            return self.wgmma_rows
        return FUSED_ROWS

    def int8_mixed_scaled_mm(
        self,
        A: Tensor,
        CA: Tensor,
        CB: Tensor,
        row_stats: Tensor,
        col_stats: Tensor,
        outlier_mask: Tensor,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        products = torch._int_mm(dequantized.as_matrix(CA), CB.t()) if _int_mm_takes(CA, CB) else None
        self.fused.int8_mm(CA, CB, products, row_stats, col_stats, A, outlier_mask, bias, A.dtype, out)


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


def _multiply(A: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = A @ weight^T + bias, the bias in the matmul's epilogue."""
    rows, result = dequantized.as_matrix(A), dequantized.as_matrix(out)
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(aligned(bias), rows, weight.t(), out=result)
