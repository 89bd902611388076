"""What bnb_core.batch_invariant() costs: layers in it, beside themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import OURS, Case, Contender, Work

import bnb_core
from bnb_core import nn
from bnb_core.autograd import grouped_linear_4bit

SIZE = 4096
EXPERTS, TOP_K, PROJECTED = 64, 8, 1024
WITHOUT = "without the mode"
Call = Callable[[], Any]


def _beside_itself(call: Call) -> Work:
    def in_the_mode() -> None:
        with bnb_core.batch_invariant():
            call()

    return Work({OURS: Contender(in_the_mode, "ours"), WITHOUT: Contender(call)}, ())


def four_bits(rows: int, dtype: torch.dtype) -> Work:
    layer = nn.LinearNF4(SIZE, SIZE, bias=False).to("cpu").requires_grad_(False)
    return _beside_itself(partial(layer, torch.randn(rows, SIZE).to(dtype)))


def eight_bits(rows: int, threshold: float) -> Work:
    """With one outlier in a row."""
    layer = nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False, threshold=threshold).to("cpu")
    x = torch.randn(rows, SIZE)
    x[:, 7] = 20.0
    return _beside_itself(partial(layer.requires_grad_(False), x.bfloat16()))


def experts(tokens: int) -> Work:
    layer = nn.GroupedLinear4bit(EXPERTS, SIZE // 2, PROJECTED, bias=False).to("cpu")
    chosen = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.view(-1)
    offsets = torch.nn.functional.pad(chosen.bincount(minlength=EXPERTS).cumsum(0), (1, 0)).int()
    x = torch.randn(len(chosen), SIZE // 2).bfloat16()
    return _beside_itself(partial(grouped_linear_4bit, x, layer.weight, layer.quant_state, offsets))


def cases() -> list[Case]:
    made = [
        Case(f"batch invariant/4-bit {str(dtype).removeprefix('torch.')}, {rows} rows", partial(four_bits, rows, dtype))
        for dtype in (torch.bfloat16, torch.float32)
        for rows in (1, 32, 256)
    ]
    made += [
        Case(f"batch invariant/8-bit, threshold {threshold}, {rows} rows", partial(eight_bits, rows, threshold))
        for threshold in (0.0, 6.0)
        for rows in (1, 32)
    ]
    return made + [
        Case(f"batch invariant/experts, {tokens} tokens, 8 of 64 each", partial(experts, tokens)) for tokens in (1, 64)
    ]
