"""A linear layer that quantizes its weight around the outlier dimensions of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.utils import OutlierTracer


class OutlierAwareLinear(nn.Linear):
    """The base of a layer that treats outlier dimensions apart: subclasses say how.

    Before its first forward, ``OutlierTracer.get_instance().initialize(model)`` must be watching the model.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor) -> Tensor:
        raise NotImplementedError("a subclass computes the layer with these outlier dimensions")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor) -> Tensor:
        raise NotImplementedError("a subclass quantizes the weight around these outlier dimensions")

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.outlier_dim is None:
            outliers = OutlierTracer.get_instance().get_outliers(self.weight)
            self.outlier_dim = x.new_empty(0, dtype=torch.int64) if outliers is None else outliers
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
