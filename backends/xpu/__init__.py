"""Kernels in Triton, for tensors on Intel GPUs.

By name only, for tests, they also run elsewhere: on the CPU in Triton's interpreter (TRITON_INTERPRET=1), and on the
GPUs of other makers that torch and Triton know; those have their own paged memory (backends/managed_memory.py).

intel-extension-for-pytorch has 4-bit ops too. They are not used: that package is at its end of life, and its last
wheels are for CPUs or need an Intel GPU, so that the suite could not hold what they compute to docs/SPEC.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from bnb_core.registry import Backend, Kernel

from ..gpu import LargeProducts
from ..native import FILLING, IN_PLACE, kernels_of

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
PLACES = {"xpu": "Intel GPUs", "cpu": "Triton's interpreter, on the CPU", "cuda": "GPUs of another maker"}
"""What the kernels run on, by torch's name for it."""

TRITON = "a torch built for Intel GPUs brings it; for the interpreter and other GPUs pip install bnb_core[triton]"


def _make_backend() -> Backend:
    """Initializes no GPU, and imports Triton only for an Intel GPU and the interpreter."""
    missing = None if _sees("xpu") else _why_no_intel_gpu()
    if os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes", "y"):
        device_type = "cpu"
    elif missing is None:
        device_type = "xpu"
    elif _sees("cuda"):
        device_type = "cuda"
    else:
        return _unavailable(missing, f"{INTERPRETER_VARIABLE}=1 has the kernels run on the CPU, to test them")
    error = _why_no_triton(device_type)
    if error is not None:
        return _unavailable(*filter(None, (missing, f"Triton cannot be imported ({error})", TRITON)))
    return Backend(
        name="xpu",
        device_types=(device_type,),
        priority=100,
        kernels={primitive: _with_first_call(primitive) for primitive in (*FILLING, *IN_PLACE)}
        if device_type == "cuda"
        else _kernels(),
        by_name_only=device_type != "xpu",
        details=lambda: _details(device_type, missing),
        paged_memory=_paged_memory() if device_type == "xpu" else None,
    )


def _unavailable(*reasons: str) -> Backend:
    return Backend("xpu", ("xpu",), 100, {}, unavailable="; ".join(reasons))


def _sees(device_type: str) -> bool:
    return getattr(torch, device_type).device_count() > 0


def _why_no_intel_gpu() -> str:
    if getattr(torch.version, "xpu", None):
        return (
            "torch sees no Intel GPU; where there is one, install its driver, Intel's compute runtime with Level Zero, "
            "and let this user open /dev/dri/render*"
        )
    return (
        f"no Intel GPU can be used: this torch ({torch.__version__}) is not built for them; where there is one, "
        "install Intel's compute runtime and a torch whose version ends in +xpu"
    )


def _why_no_triton(device_type: str) -> str | None:
    """The error, in words. For GPUs of other makers it is only looked for."""
    if device_type == "cuda":
        return None if find_spec("triton") else "No module named 'triton'"
    try:
        _kernels()
    except ImportError as error:
        return str(error)
    return None


@cache
def _kernels() -> dict[str, Kernel]:
    from . import kernels
    from .rows_alike import ROWS_ALIKE

    return kernels_of(LargeProducts(kernels), ROWS_ALIKE)


def _with_first_call(primitive: str) -> Callable[..., None]:
    """A kernel that Triton is imported for with its first call."""

    def call(*arguments: Any, **outputs: Any) -> None:
        _kernels()[primitive].function(*arguments, **outputs)

    return call


def _paged_memory() -> Any:
    from .launch import touch
    from .pinned_memory import PinnedMemory

    return PinnedMemory(touch)


def _details(device_type: str, missing: str | None) -> dict[str, str]:
    import triton

    facts = {"Triton": triton.__version__, "runs on": PLACES[device_type]}
    if missing is None:
        return {**facts, "paged memory": "pinned host memory, which the GPU uses in place"}
    return {**facts, "Intel GPUs": missing, "paged memory": "none: only on Intel GPUs"}


backend = _make_backend()
