"""Matmul with a 4-bit weight (docs/SPEC.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnb_core.primitive import aligned

from ..torch_precision import exact_matmuls
from .quantize import dequantize_4bit


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
    nested = (nested_absmax, nested_code, offset, nested_blocksize)
    weight = dequantize_4bit(B, absmax, blocksize, quant_type, shape, torch.float32, *nested)
    with exact_matmuls(A.device, torch.float32):
        out = aligned(A.float()) @ weight.t()
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
    nested = (nested_absmax, nested_code, offset, nested_blocksize)
    weight = dequantize_4bit(B, absmax, blocksize, quant_type, shape, torch.float32, *nested)
    with exact_matmuls(dY.device, torch.float32):
        return (aligned(dY.float()) @ weight).to(dY.dtype)
