"""Less exact matmuls, which a process may allow torch: a primitive must not become less exact by that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def _by_older_names() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _by_newer_names() -> Iterator[None]:
    """torch 2.9 and later; older ones have one set of names."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        yield
        return
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
    try:
        yield
    finally:
        cuda.fp32_precision = cpu.fp32_precision = "none"


LESS_EXACT = {"older names": _by_older_names, "newer names": _by_newer_names}
