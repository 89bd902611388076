"""The experts of a mixture: one layer's projections, and whole layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import limits
import peers
import torch
from measure import OURS, Case, Contender, Requirement, Work, rotating
from torch.nn.functional import linear, silu

from bnb_core import functional
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.nn import Experts4bit

EXPERTS, TOP_K, HIDDEN, PROJECTED = 64, 8, 2048, 2048
"""A layer of OLMoE-1B-7B: gate and up projections side by side."""
QWEN3 = {"num_experts": 128, "hidden_size": 2048, "intermediate_size": 768}
"""A layer of Qwen3-30B-A3B."""

DENSE = "torch dense bf16, expert by expert"
DEQUANTIZED = "dequantize, einsum"


def _stack() -> tuple[torch.Tensor, functional.QuantState]:
    return functional.quantize_4bit(
        torch.randn(EXPERTS, PROJECTED, HIDDEN).bfloat16(), compress_statistics=True, quant_type="nf4", blocksize=64
    )


def _offsets(rows: torch.Tensor) -> torch.Tensor:
    """Of so many rows for each expert."""
    return torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()


def one_token() -> Work:
    """The first projection for one token, whose experts come from memory: each call has others."""
    packed, state = _stack()
    x = torch.randn(TOP_K, HIDDEN).bfloat16()
    chosen = [torch.arange(first, EXPERTS, EXPERTS // TOP_K) for first in range(EXPERTS // TOP_K)]
    offsets = [_offsets(torch.zeros(EXPERTS, dtype=torch.int64).index_fill(0, experts, 1)) for experts in chosen]
    moved = TOP_K * PROJECTED * HIDDEN * (0.5 + 1 / 64 + 4 / 64 / 256)

    def dequantized(experts: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tk,tnk->tn", x, functional.dequantize_4bit(packed, state)[experts])

    contenders = {
        OURS: Contender(rotating(lambda each: grouped_linear_4bit(x, packed, state, each), offsets), "ours"),
        "read bandwidth": limits.read(moved),
        DEQUANTIZED: Contender(rotating(dequantized, chosen)),
    }
    requirements = (Requirement("read bandwidth", 1 / 0.8), Requirement(DEQUANTIZED, 1 / 3))
    return Work(contenders, requirements, moved, 2.0 * TOP_K * PROJECTED * HIDDEN)


def many_tokens(tokens: int) -> Work:
    """The first projection of a prompt, beside a loop over the experts in bf16."""
    packed, state = _stack()
    dense = functional.dequantize_4bit(packed, state)
    rows = torch.multinomial(torch.ones(EXPERTS), tokens * TOP_K, replacement=True).bincount(minlength=EXPERTS)
    x, offsets = torch.randn(tokens * TOP_K, HIDDEN).bfloat16(), _offsets(rows)

    def loop() -> torch.Tensor:
        return torch.cat([linear(part, weight) for part, weight in zip(x.split(rows.tolist()), dense, strict=True)])

    contenders = {
        OURS: Contender(partial(grouped_linear_4bit, x, packed, state, offsets), "ours"),
        DENSE: Contender(loop),
    }
    return Work(contenders, (Requirement(DENSE, 1.0),), operations=2.0 * len(x) * PROJECTED * HIDDEN)


def _layer_of_peer(x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """bitsandbytes' layers, one for each projection of each expert, as it quantizes a list of experts."""

    def projection(inputs: int, outputs: int) -> Any:
        layer = peers.bitsandbytes.nn.Linear4bit(  # type: ignore[union-attr]
            inputs, outputs, bias=False, compute_dtype=x.dtype, quant_type="nf4"
        )
        return layer.to("cpu").eval()

    hidden, intermediate = QWEN3["hidden_size"], QWEN3["intermediate_size"]
    experts = [
        (projection(hidden, intermediate), projection(hidden, intermediate), projection(intermediate, hidden))
        for _ in range(QWEN3["num_experts"])
    ]

    def forward(chosen: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for index in chosen[0].tolist():
            gate, up, down = experts[index]
            total += down(silu(gate(x)) * up(x)) / TOP_K
        return total

    return forward


def layer(tokens: int) -> Work:
    """A whole layer of Qwen3-30B-A3B; each call has other experts."""
    experts = Experts4bit(**QWEN3, device="cpu").to("cpu")
    x, weights = torch.randn(tokens, QWEN3["hidden_size"]).bfloat16(), torch.full((tokens, TOP_K), 1 / TOP_K)
    chosen = [torch.rand(tokens, QWEN3["num_experts"]).topk(TOP_K).indices for _ in range(16)]
    contenders = {OURS: Contender(rotating(lambda each: experts(x, each, weights), chosen), "ours")}
    requirements = []
    if peers.bitsandbytes is not None:
        contenders[peers.BITSANDBYTES] = Contender(rotating(_layer_of_peer(x), chosen))
        requirements = [Requirement(peers.BITSANDBYTES, 1 / 4)]
    return Work(contenders, requirements)


def cases() -> list[Case]:
    return [
        Case("experts/one token, 8 of 64", one_token),
        Case("experts/2048 tokens, 8 of 64 each", partial(many_tokens, 2048), quick=False),
        Case("experts/layer of Qwen3-30B-A3B, one token", partial(layer, 1)),
    ]
