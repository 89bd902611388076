"""Matmul with a 4-bit weight (docs/SPEC.md section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core.records import Weight4bit

from .matmul import product
from .quantize import dequantize_4bit


def gemm_4bit(A: Tensor, B: Weight4bit, bias: Tensor | None) -> Tensor:
    out = product(A, dequantize_4bit(B, torch.float32).t())
    return (out if bias is None else out + bias.float()).to(A.dtype)


def gemm_4bit_backward(dY: Tensor, B: Weight4bit) -> Tensor:
    return product(dY, dequantize_4bit(B, torch.float32)).to(dY.dtype)
