"""The CPU's kernels, and torch's dense matmul where there is none that is fused."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dequantized
from ..native import DTYPE_CODES, QUANT_TYPE_CODES, NativeKernels, block_scales


class _Workspace(threading.local):
    """Where a thread's backward passes dequantize the weight that they multiply by, one after the other.

    It is kept up to ``MOST_KEPT``, because the page faults of a fresh tensor take longer than dequantizing into it.
    """

    MOST_KEPT = 64 * 2**20
    """In bytes, of each thread: a weight of 4096 x 8192 in bf16."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > self.MOST_KEPT:
            return torch.empty(tuple(shape), dtype=dtype)
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8)
        return self.buffer[:size].view(dtype).view(*shape)


class CpuKernels(NativeKernels):
    """The primitives over a module of csrc_cpu."""

    _workspace = _Workspace()

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
        N, K = shape
        nested = (nested_absmax, nested_code, offset, nested_blocksize)
        if self.module.gemm_4bit_backward(
            dY, DTYPE_CODES[dY.dtype], math.prod(dY.shape[:-1]), N, K, B,
            *block_scales(absmax, *nested), blocksize, QUANT_TYPE_CODES[quant_type], out,
        ):  # fmt: skip
            return
        empty = self._workspace.take
        dequantized.gemm_4bit_backward(self, dY, B, shape, absmax, blocksize, quant_type, *nested, out, empty)
