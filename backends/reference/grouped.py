"""Matmul with a 4-bit weight for each group of rows (docs/SPEC.md section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from bnb_core.checks import check_offsets
from bnb_core.records import Weight4bit

from .matmul import product
from .quantize import dequantize_4bit


def _groups(rows: Tensor, B: Weight4bit, offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of each group, and its weight in f32."""
    check_offsets(offsets, len(rows))
    weights = dequantize_4bit(B, torch.float32)
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        yield rows[begin:end], weights[e]


def grouped_gemm_4bit(A: Tensor, B: Weight4bit, offsets: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.cat([product(rows, weight.t()) for rows, weight in _groups(A, B, offsets)])
    if bias is not None:
        out += bias.float().repeat_interleave(offsets.diff(), dim=0)
    return out.to(A.dtype)


def grouped_gemm_4bit_backward(dY: Tensor, B: Weight4bit, offsets: Tensor) -> Tensor:
    return torch.cat([product(rows, weight) for rows, weight in _groups(dY, B, offsets)]).to(dY.dtype)
