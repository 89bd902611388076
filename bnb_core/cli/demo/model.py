"""A small decoder-only transformer in plain torch: what is quantized are its `nn.Linear` layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import VOCABULARY
from .settings import Settings

Cache = dict[int, tuple[Tensor, Tensor]]
"""Per layer, the keys and values of the positions seen so far, each `[batch, heads, positions, head]`."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions (RoFormer, arXiv 2104.09864)."""

    def __init__(self, index: int, width: int, heads: int) -> None:
        super().__init__()
        self.index, self.heads = index, heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(heads[0], rotation), rotate(heads[1], rotation), heads[2]
        is_first_call = cache is None or self.index not in cache
        if cache is not None:
            if not is_first_call:
                past_key, past_value = cache[self.index]
                key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
            cache[self.index] = key, value
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=is_first_call)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalized input and added to the stream."""

    def __init__(self, index: int, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(index, width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Next-byte model: tokens `[batch, positions]` int64 to logits `[batch, positions, 256]`.

    With a `cache` (start with an empty dict) each call takes only the tokens that are new:
    any number at first, then one at a time.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, settings.width)
        self.blocks = nn.ModuleList(Block(index, settings.width, settings.heads) for index in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.lm_head = nn.Linear(settings.width, VOCABULARY, bias=False)
        self.head_width = settings.width // settings.heads
        self.apply(initialize)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        start = cache[0][0].shape[2] if cache else 0
        rotation = rotations(start, tokens.shape[1], self.head_width, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation, cache)
        return self.lm_head(self.norm(x))


def initialize(module: nn.Module) -> None:
    """Normal weights with the standard deviation that GPT-2 uses."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)


def rotations(start: int, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each `[count, width / 2]`, of the angles at positions from `start`."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(start, start + count, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of features of x `[..., positions, width]` by its position's angle."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
