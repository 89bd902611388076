"""Matmul with a 4-bit weight (docs/SPEC.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..torch_precision import exact_matmuls
from .quantize import dequantize_4bit, dequantize_blockwise


def gemm_4bit(
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
) -> Tensor:
    weight = _weight(B, shape, absmax, blocksize, quant_type, nested_absmax, nested_code, offset, nested_blocksize)
    with exact_matmuls(A.device, torch.float32):
        out = A.float() @ weight.t()
    if bias is not None:
        out = out + bias.float()
    return out.to(A.dtype)


def gemm_4bit_backward(
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
) -> Tensor:
    weight = _weight(B, shape, absmax, blocksize, quant_type, nested_absmax, nested_code, offset, nested_blocksize)
    with exact_matmuls(dY.device, torch.float32):
        return (dY.float() @ weight).to(dY.dtype)


def _weight(
    B: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """W in f32."""
    if nested_absmax is not None and nested_code is not None and offset is not None:
        absmax = dequantize_blockwise(absmax, nested_absmax, nested_code, nested_blocksize, torch.float32) + offset
    return dequantize_4bit(B, absmax, blocksize, quant_type, shape, torch.float32)
