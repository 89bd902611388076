"""Quantized layers, and a small model with adapters on a frozen quantized base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearFP4, LinearNF4

STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"nf4, {storage}": (lambda storage=storage: LinearNF4(64, 48, quant_storage=storage)) for storage in STORAGES},
    "fp4": lambda: LinearFP4(64, 48, compress_statistics=False),
    "8-bit": lambda: Linear8bitLt(64, 48, has_fp16_weights=False),
    "8-bit with outliers": lambda: Linear8bitLt(64, 48, has_fp16_weights=False, threshold=2.0),
    "4-bit embedding": lambda: EmbeddingNF4(48, 64),
    "8-bit embedding": lambda: Embedding8bit(48, 64),
}


def one_layer(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model of one layer, and an input of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(LAYERS[name]()).to("cpu")
    return model, torch.arange(48) if "embedding" in name else torch.randn(5, 64)


class Adapted(nn.Module):
    """A frozen quantized layer with an adapter of low rank (QLoRA), whose output returns to the input's width."""

    def __init__(self, base: nn.Module, width: int, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted_model(kind: str, width: int = 64, layers: int = 3, seed: int = 0, **settings: Any) -> nn.Sequential:
    """Of layers that are ``4bit`` or ``8bit``, quantized from the same values whatever else is set."""
    torch.manual_seed(seed)
    adapted: list[nn.Module] = []
    for _ in range(layers):
        base = (
            LinearNF4(width, width, **settings)
            if kind == "4bit"
            else Linear8bitLt(width, width, has_fp16_weights=False)
        )
        adapted += [Adapted(base, width), nn.GELU()]
    return nn.Sequential(*adapted[:-1]).to("cpu")
