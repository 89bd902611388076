"""Less exact matmuls, which a process may allow torch: a primitive must not become less exact by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bnb_core.conformance.case import Context
from bnb_core.conformance.runner import Skip

HALF_SETTINGS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@contextmanager
def _by_older_names() -> Iterator[None]:
    settings, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    before = {name: getattr(settings, name) for name in HALF_SETTINGS if hasattr(settings, name)}
    torch.set_float32_matmul_precision("medium")
    for name in before:
        setattr(settings, name, True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in before.items():
            setattr(settings, name, value)


@contextmanager
def _by_newer_names() -> Iterator[None]:
    if not hasattr(torch.backends.mkldnn, "matmul"):
        raise Skip("torch before 2.9 has the older names only")
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


LESS_EXACT = {"older names": _by_older_names, "newer names": _by_newer_names}


def check_less_exact(context: Context, check: Callable[[Context], None], names: str) -> None:
    """torch's matmuls may be allowed less than the dtype: not where a primitive uses them."""
    with LESS_EXACT[names]():
        check(context)
