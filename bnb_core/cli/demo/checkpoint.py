"""A quantized model as a safetensors file, and back into a fresh model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

import bnb_core as bnb

from . import data
from .model import Transformer
from .quantized import FLOAT, METHODS, NOT_QUANTIZED, QLORA_BASE
from .settings import Settings

FILES = {FLOAT: "model-f32.safetensors", QLORA_BASE: "model-nf4-double-quantized.safetensors"}
"""What the report folder keeps, by method."""


def save_model(model: nn.Module, path: Path) -> None:
    """Write the state dict; tensors that layers share are written once for each of them."""
    path.write_bytes(save({name: tensor.clone() for name, tensor in model.state_dict().items()}))


def load(path: Path, method: str, settings: Settings) -> nn.Module:
    """A fresh model with the weights of `path`, which holds a model quantized by `method` (or f32)."""
    model: nn.Module = Transformer(settings)
    if method != FLOAT:
        bnb.utils.replace_linear(model, METHODS[method], skip_modules=NOT_QUANTIZED)
    model.load_state_dict(load_file(path, device=settings.device))
    return model.to(settings.device).eval()


@torch.no_grad()
def same_logits(first: nn.Module, second: nn.Module, tokens: torch.Tensor, settings: Settings) -> bool:
    """Whether both models give bit-identical logits on a batch of text."""
    windows = data.evaluation_windows(tokens, settings)[: settings.batch_size].to(settings.device)
    return torch.equal(first(windows), second(windows))
