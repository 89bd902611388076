"""The CPU's kernels, and torch's dense matmul for the products that they leave to it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dequantized import DenseProducts


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


class CpuKernels(DenseProducts):
    """The primitives over a module of csrc_cpu."""

    _workspace = _Workspace()

    def memory_for_weight(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._workspace.take(shape, dtype)
