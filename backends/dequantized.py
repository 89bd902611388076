"""What kernels leave to torch's dense matmuls: products for which these make up for writing the whole weight down."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from bnb_core.primitive import TORCH_ALIGNMENT, aligned
from bnb_core.records import Int8Weight, Weight4bit
from bnb_core.row_passes import as_matrix

from .torch_precision import exact_matmuls

LEAST_TERMS = 128
"""Of a sum, from which on weights may be rounded to f16 or bf16: the errors of fewer do not even out (docs/SPEC.md
section 3)."""


class Dense(IntEnum):
    """What a kernel leaves of a product: nothing, or all of it, with the weight dequantized to A's dtype or to f32.

    The compiled kernels answer with these numbers (csrc_shared/kernels.h).
    """

    NOTHING = 0
    IN_DTYPE = 1
    IN_F32 = 2


def dense_for(dtype: torch.dtype, terms: int) -> Dense:
    """How torch's matmul has to have a weight for sums of so many terms."""
    return Dense.IN_DTYPE if dtype == torch.float32 or terms >= LEAST_TERMS else Dense.IN_F32


class DenseProducts:
    """The primitives over kernels that leave products to torch.

    Args:
        fused: a function for each primitive, as NativeKernels has them; those of products return :class:`Dense`.
    """

    def __init__(self, fused: Any) -> None:
        self.fused = fused

    def __getattr__(self, primitive: str) -> Any:
        return getattr(self.fused, primitive)

    def memory_for_weight(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def gemm_4bit(self, A: Tensor, B: Weight4bit, bias: Tensor | None, out: Tensor) -> None:
        dense = self.fused.gemm_4bit(A, B, bias, out)
        if dense:
            _multiply(A, self._dense_4bit(B, A, dense).t(), bias, out)

    def gemm_4bit_backward(self, dY: Tensor, B: Weight4bit, out: Tensor) -> None:
        dense = self.fused.gemm_4bit_backward(dY, B, out)
        if dense:
            _multiply(dY, self._dense_4bit(B, dY, dense), None, out)

    def int8_linear_backward(self, dY: Tensor, B: Int8Weight, out: Tensor) -> None:
        dense = self.fused.int8_linear_backward(dY, B, out)
        if dense:
            weight = self.memory_for_weight(B.codes.shape, _weight_dtype(dense, dY), dY.device)
            self.fused.int8_vectorwise_dequant(*B, weight)
            _multiply(dY, weight, None, out)

    def _dense_4bit(self, B: Weight4bit, A: Tensor, dense: int) -> Tensor:
        weight = self.memory_for_weight(B.shape, _weight_dtype(dense, A), A.device)
        self.fused.dequantize_4bit(B, weight.dtype, weight)
        return weight


def _weight_dtype(dense: int, A: Tensor) -> torch.dtype:
    return A.dtype if dense == Dense.IN_DTYPE else torch.float32


def _multiply(A: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = A @ weight + bias, the bias in the matmul's epilogue. Its sums are those of an aligned ``out``."""
    if out.data_ptr() % TORCH_ALIGNMENT != 0:
        apart = torch.empty_like(out)
        _multiply(A, weight, bias, apart)
        out.copy_(apart)
        return
    rows, result = as_matrix(aligned(A)), as_matrix(out)
    with exact_matmuls(A.device, weight.dtype):
        if weight.dtype != A.dtype:
            product = rows.float() @ weight
            result.copy_(product if bias is None else product + bias.float())
        elif bias is None:
            torch.mm(rows, weight, out=result)
        else:
            torch.addmm(aligned(bias), rows, weight, out=result)
