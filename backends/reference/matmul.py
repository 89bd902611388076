"""Products of floating-point matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core.primitive import aligned

from ..torch_precision import exact_matmuls


def product(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B`` in f32, whatever dtypes they have."""
    with exact_matmuls(A.device, torch.float32):
        return aligned(A.float()) @ B.float()
