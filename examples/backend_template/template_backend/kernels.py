"""Two primitives in numpy. A kernel has its primitive's arguments, already checked, and fills the outputs ``out``."""

import numpy as np
import torch
from torch import Tensor


def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    """``code[A_i] * absmax_b`` in f32, rounded once: docs/SPEC.md section 2 promises the bits."""
    codes = A.view(-1).numpy()
    scales = np.repeat(absmax.view(-1).numpy(), blocksize)[: len(codes)]
    with np.errstate(invalid="ignore"):
        values = code.numpy()[codes] * scales
    out.view(-1).copy_(torch.from_numpy(values))


def int8_vectorwise_dequant(A: Tensor, stats: Tensor, out: Tensor) -> None:
    """``A * stats / 127`` by rows."""
    rows = A.view(stats.numel(), A.shape[-1]).numpy().astype(np.float32)
    values = rows * stats.view(-1, 1).numpy() / np.float32(127)
    out.view(-1).copy_(torch.from_numpy(values).view(-1))
