"""A 4-bit weight in full, for torch's dense matmuls, over any backend's own kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnb_core.primitive import aligned

from .torch_precision import exact_matmuls

LEAST_TERMS = 128
"""Of a sum, from which on weights may be rounded to f16 or bf16: the errors of fewer do not even out (docs/SPEC.md
section 3)."""


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]; columns may be 0, for which view(-1, columns) is ambiguous."""
    return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def gemm_4bit_backward(
    kernels: Any,
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
    empty: Callable[[Sequence[int], torch.dtype], Tensor],
) -> None:
    """The primitive by torch's dense matmul.

    Args:
        kernels: functions for each primitive, as NativeKernels has them.
        empty: gives memory for the weight.
    """
    N, K = shape
    weight = empty((N, K), dY.dtype if N >= LEAST_TERMS else torch.float32)
    nested = (nested_absmax, nested_code, offset, nested_blocksize)
    kernels.dequantize_4bit(B, absmax, blocksize, quant_type, (N, K), weight.dtype, *nested, weight)
    gradient, result = as_matrix(aligned(dY)), as_matrix(out)
    with exact_matmuls(dY.device, weight.dtype):
        if weight.dtype == dY.dtype:
            torch.mm(gradient, weight, out=result)
        else:
            result.copy_(gradient.float() @ weight)
