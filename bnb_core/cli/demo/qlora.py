"""QLoRA (arXiv 2305.14314): low-rank adapters trained on top of a frozen, quantized model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import bnb_core as bnb

from . import checkpoint, data
from .fresh_process import peak_memory
from .quantized import FLOAT, QLORA_BASE, linear_layers, weight_bytes
from .settings import Settings
from .training import perplexity, train


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run: which frozen base, and which optimizer for the adapters."""

    name: str
    base: str
    optimizer: Callable[..., torch.optim.Optimizer]


RECIPES = (
    Recipe("LoRA: f32, AdamW", FLOAT, torch.optim.AdamW),
    Recipe("QLoRA: NF4, PagedAdamW8bit", QLORA_BASE, bnb.optim.PagedAdamW8bit),
)


@dataclass(frozen=True)
class FineTuning:
    """What one run measured. Peak memory is None where the system does not tell it."""

    losses: list[float]
    perplexity_before: float
    perplexity_after: float
    adapter_parameters: int
    base_bytes: int
    optimizer_state_bytes: int
    adapters_with_32bit_state: int
    adapters_with_paged_state: int
    memory_at_start: int | None
    peak_memory: int | None


class LoRA(nn.Module):
    """`linear(x) + scale * up(down(x))` (arXiv 2106.09685); `up` starts at zero: no change at first."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.down.T @ self.up.T)


def attach_adapters(model: nn.Module, settings: Settings) -> list[nn.Parameter]:
    """Freeze `model`, wrap its quantized (or quantizable) layers in LoRA, return what is trained."""
    model.requires_grad_(False)
    for name, linear in linear_layers(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoRA(linear, settings.lora_rank, settings.lora_scale))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def chosen_backend(settings: Settings) -> AbstractContextManager:
    """The context in which the backend that was asked for serves; without one, the registry chooses."""
    return bnb.use_backend(settings.backend) if settings.backend is not None else nullcontext()


def fine_tune(
    recipe: Recipe, path: Path, text: data.Corpus, settings: Settings, on_step: Callable[[float], None]
) -> FineTuning:
    """Train adapters over the model saved at `path`. Meant to be the only thing its process does."""
    memory_at_start = peak_memory(settings.device)
    with chosen_backend(settings):
        model = checkpoint.load(path, recipe.base, settings)
        before = perplexity(model, text.held_out, settings)
        base_bytes = weight_bytes(model)
        torch.manual_seed(settings.seed)
        adapters = attach_adapters(model, settings)
        optimizer = recipe.optimizer(adapters, lr=settings.lora_learning_rate, weight_decay=0.0)
        losses = train(model, optimizer, text.train, settings.fine_tuning_steps, settings, on_step)
        after = perplexity(model, text.held_out, settings)
    return FineTuning(
        losses=losses,
        perplexity_before=before,
        perplexity_after=after,
        adapter_parameters=sum(parameter.numel() for parameter in adapters),
        base_bytes=base_bytes,
        optimizer_state_bytes=state_bytes(optimizer),
        adapters_with_32bit_state=sum(has_32bit_state(optimizer, parameter) for parameter in adapters),
        adapters_with_paged_state=sum(has_paged_state(optimizer, parameter) for parameter in adapters),
        memory_at_start=memory_at_start,
        peak_memory=peak_memory(settings.device),
    )


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    return [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, code tables and scales included; a shared tensor counts once."""
    tensors = (tensor for parameter in optimizer.state for tensor in state_tensors(optimizer, parameter))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def has_32bit_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether any state tensor of the parameter's size is kept in f32."""
    tensors = (tensor for tensor in state_tensors(optimizer, parameter) if tensor.numel() == parameter.numel())
    return any(tensor.dtype == torch.float32 for tensor in tensors)


def has_paged_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether any state tensor lies in paged memory; a paged optimizer leaves small states out of it."""
    return any(getattr(tensor, "is_paged", False) for tensor in state_tensors(optimizer, parameter))
