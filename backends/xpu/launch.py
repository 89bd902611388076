"""Run a kernel where its tensors are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

TILE = 2**11
"""Elements that one program of an elementwise kernel works on. Not tuned on hardware yet."""

SMALLEST_DOT = 16
"""Rows of the smallest tile that tl.dot takes."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the current stream of its tensors' device, without fused multiply-adds; no program, no launch."""
    if 0 in grid:
        return
    with _current(next(argument for argument in arguments if isinstance(argument, torch.Tensor)).device):
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Where there are several GPUs, Triton launches on the current one."""
    if device.type == "cpu":
        return nullcontext()
    module = getattr(torch, device.type)
    return nullcontext() if module.device_count() == 1 else module.device(device)
