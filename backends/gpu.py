"""What a GPU's compiled kernels leave to torch: products large enough for its dense matmul.

CUDA, HIP and the simulator of both share it; each only says where its module and its streams are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .native import NativeKernels

FUSED_ROWS = 64
"""Up to so many rows of A the fused kernel multiplies; above, the weight is dequantized for torch's matmul, which reads
it from the cache as often as it needs. Not measured on hardware yet."""

INT_MM_ROWS = 17
INT_MM_MULTIPLE = 8
"""What torch._int_mm takes on a GPU: at least 17 rows, and multiples of 8 in the other two sizes."""


class GpuKernels(NativeKernels):
    """The primitives over a module of csrc_cuda, with torch's matmuls where they are faster."""

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
        scales = (nested_absmax, nested_code, offset, nested_blocksize)
        if not _is_large(A, math.prod(A.shape[:-1])):
            super().gemm_4bit(A, B, shape, absmax, blocksize, quant_type, bias, *scales, out)
            return
        if nested_absmax is not None:
            absmax = self._decoded_scales(absmax, nested_absmax, nested_code, offset, nested_blocksize)
        weight = torch.empty(tuple(shape), dtype=A.dtype, device=A.device)
        self.dequantize_4bit(B, absmax, blocksize, quant_type, shape, A.dtype, weight)
        with full_precision_accumulation(A.dtype):
            _multiply(A, weight, bias, out)

    def _decoded_scales(
        self, codes: Tensor, nested_absmax: Tensor, nested_code: Any, offset: Any, nested_blocksize: int
    ) -> Tensor:
        """The f32 scales from double-quantized ones."""
        scales = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        self.dequantize_blockwise(codes, nested_absmax, nested_code, nested_blocksize, torch.float32, scales)
        return scales.add_(offset)

    def int8_linear_matmul(self, A: Tensor, B: Tensor, out: Tensor) -> None:
        if _int_mm_takes(A, B):
            torch._int_mm(A.view(-1, A.shape[-1]), B.t(), out=out.view(-1, B.shape[0]))
        else:
            super().int8_linear_matmul(A, B, out)

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
            super().int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype, out)
            return
        product = torch._int_mm(A.view(-1, A.shape[-1]), B.t())
        self.int8_mm_dequant(product, row_stats, col_stats, bias, dtype, out)


def _is_large(A: Tensor, rows: int) -> bool:
    """Whether the product is for torch's matmul: there are many rows, and torch computes them as exactly as we do.

    In f32 torch may be told to use TF32, whose products are wrong by more than docs/SPEC.md section 3 allows.
    """
    if rows <= FUSED_ROWS:
        return False
    return A.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"


def _int_mm_takes(A: Tensor, B: Tensor) -> bool:
    N, K = B.shape
    rows = math.prod(A.shape[:-1])
    return rows >= INT_MM_ROWS and N % INT_MM_MULTIPLE == 0 and K % INT_MM_MULTIPLE == 0 and N > 0 and K > 0


@contextmanager
def full_precision_accumulation(dtype: torch.dtype) -> Iterator[None]:
    """Keep torch's matmuls of this dtype from adding up partial sums in it, as they are allowed to by default."""
    settings = torch.backends.cuda.matmul
    name = {
        torch.float16: "allow_fp16_reduced_precision_reduction",
        torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    }.get(dtype)
    if name is None:
        yield
        return
    allowed = getattr(settings, name)
    setattr(settings, name, False)
    try:
        yield
    finally:
        setattr(settings, name, allowed)


def _multiply(A: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = A @ weight^T + bias, the bias in the matmul's epilogue."""
    rows, result = A.view(-1, A.shape[-1]), out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)
