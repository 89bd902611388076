"""A small decoder of the Llama family: adapters on a frozen quantized base."""

from __future__ import annotations

import torch
from quantized import Adapted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnb_core.nn import Linear4bit, Linear8bitLt
from bnb_core.plan import Settings, Shape


class LowRank(Adapted):
    """Also for a base whose output has another width."""

    def __init__(self, outputs: int, inputs: int, settings: Settings) -> None:
        base: nn.Module
        if settings.bits == 8:
            base = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        else:
            nested = settings.double_quantization
            base = Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=nested)
        super().__init__(base, inputs, settings.lora_rank)
        self.up = nn.Linear(settings.lora_rank, outputs, bias=False)


class Layer(nn.Module):
    def __init__(self, shape: Shape, settings: Settings) -> None:
        super().__init__()
        self.linears = nn.ModuleList(LowRank(*sizes, settings) for sizes in shape.linears)
        self.norms = nn.ModuleList(nn.RMSNorm(shape.width).requires_grad_(False) for _ in range(2))
        self.head_width = 32

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, output, gate, up, down = self.linears
        normed = self.norms[0](x)
        q, k, v = (self._heads(linear(normed)) for linear in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + output(attended.transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        return x + down(F.silu(gate(normed)) * up(normed))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class Decoder(nn.Module):
    def __init__(self, shape: Shape, settings: Settings) -> None:
        super().__init__()
        self.checkpointing = settings.checkpointing
        self.embedding = nn.Embedding(shape.vocabulary, shape.width).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(shape, settings) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width).requires_grad_(False)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False).requires_grad_(False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing and self.training else layer(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def decoder(shape: Shape, settings: Settings) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape, settings).to("cpu")
