"""Small models, optimizers and steps that one process and several take alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bnb_core import optim

FAMILIES = ("Adam", "AdamW", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "Adagrad", "SGD")
KINDS = [f"{family}{bits}bit" for family in FAMILIES for bits in (8, 32)]
KINDS += ["PagedAdamW8bit", "PagedAdamW32bit", "PagedLion8bit", "PagedAdEMAMix8bit"]
SETTINGS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "LARS": {"momentum": 0.9, "max_unorm": 0.02}}
WIDTH = 256
ODD_WIDTH = 75
"""Borders of shards are none of blocks."""


def build(seed: int = 0, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def optimizer_for(kind: str, params: Any, **settings: Any) -> Any:
    family = next(name for name in sorted(FAMILIES, key=len, reverse=True) if name in kind)
    settings = {"weight_decay": 0.01, "lr": 1e-3, **SETTINGS.get(family, {}), **settings}
    return getattr(optim, kind)(params, **settings)


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int = 4,
    first: int = 0,
    rows: int = 8,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Each rank has its rows of every batch; the losses are those of the whole batches."""
    is_running = torch.distributed.is_initialized()
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_running else (0, 1)
    width = next(module for module in model.modules() if isinstance(module, nn.Linear)).in_features
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(step)).to(dtype).chunk(ranks)[rank]
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        total = loss.detach().clone()
        if is_running:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, gathered."""
    detached = ((name, p.detach()) for name, p in model.named_parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in detached}
