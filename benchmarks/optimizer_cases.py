"""One step of each optimizer on a parameter of 4096 x 4096, beside torch's of its family and bitsandbytes'."""

from __future__ import annotations

from functools import partial
from typing import Any

import peers
import torch
from measure import OURS, Case, Contender, Requirement, Work

import bnb_core.optim

SHAPE = (4096, 4096)
REFERENCE_8BIT = "torch AdamW, fused, f32"
EIGHT_BIT = (
    "Adam8bit",
    "AdamW8bit",
    "Lion8bit",
    "AdEMAMix8bit",
    "SGD8bit",
    "RMSprop8bit",
    "Adagrad8bit",
    "LAMB8bit",
    "LARS8bit",
)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

FUSED: dict[str, Any] = {"fused": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam32bit": ("Adam", FUSED),
    "AdamW32bit": ("AdamW", FUSED),
    "LAMB32bit": ("AdamW", FUSED),
    "AdEMAMix32bit": ("AdamW", FUSED),
    "SGD32bit": ("SGD", {"momentum": 0.9, **FUSED}),
    "LARS32bit": ("SGD", {"momentum": 0.9, **FUSED}),
    "Lion32bit": ("SGD", {"momentum": 0.9, **FUSED}),
    "RMSprop32bit": ("RMSprop", {"foreach": True}),
    "Adagrad32bit": ("Adagrad", FUSED),
}
"""The optimizer of torch that is nearest: for those that torch has not, one with as many states or one fewer."""


def _parameter(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(SHAPE).to(dtype))
    parameter.grad = torch.randn(SHAPE).to(dtype)
    return parameter


def _keywords(name: str) -> dict[str, Any]:
    return {"momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}


def eight_bit(name: str, dtype: str) -> Work:
    make, keywords = partial(_parameter, DTYPES[dtype]), _keywords(name)
    contenders = {
        OURS: Contender(peers.step_of(getattr(bnb_core.optim, name), keywords, make()), "ours"),
        REFERENCE_8BIT: Contender(peers.step_of(torch.optim.AdamW, FUSED, _parameter()), "limit"),
        **peers.optimizer(name, keywords, make),
    }
    return Work(contenders, (Requirement(REFERENCE_8BIT, 1.0), Requirement(peers.BITSANDBYTES, 1 / 15)))


def thirty_two_bit(name: str) -> Work:
    family, torch_keywords = FAMILIES[name]
    keywords = _keywords(name)
    reference = f"torch {family}, {next(key for key in ('fused', 'foreach') if key in torch_keywords)}"
    contenders = {
        OURS: Contender(peers.step_of(getattr(bnb_core.optim, name), keywords, _parameter()), "ours"),
        reference: Contender(peers.step_of(getattr(torch.optim, family), torch_keywords, _parameter()), "limit"),
        **peers.optimizer(name, keywords, _parameter),
    }
    return Work(contenders, (Requirement(reference, 1.0),))


def cases() -> list[Case]:
    return [
        *(
            Case(f"{name}/{dtype}", partial(eight_bit, name, dtype), quick=(name, dtype) == ("Adam8bit", "f32"))
            for name in EIGHT_BIT
            for dtype in DTYPES
        ),
        *(Case(f"{name}/f32", partial(thirty_two_bit, name), quick=name == "Adam32bit") for name in FAMILIES),
    ]
