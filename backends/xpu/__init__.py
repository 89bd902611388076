"""Kernels in Triton, for tensors on Intel GPUs.

By name only, for tests, they also run elsewhere: on the CPU in Triton's interpreter (TRITON_INTERPRET=1), and on the
GPUs of other makers that torch and Triton know.
"""

from __future__ import annotations

import os

import torch

from bnb_core.registry import Backend

from ..gpu import LargeProducts
from ..native import kernels_of
from .pinned_memory import PinnedMemory

INTERPRETER_VARIABLE = "TRITON_INTERPRET"


def _make_backend() -> Backend:
    """Initializes no GPU, and imports Triton only where something can run."""
    interpreted = os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")
    if not (interpreted or _sees("xpu") or _sees("cuda")):
        return _unavailable(
            "torch sees no Intel GPU"
            if getattr(torch.version, "xpu", None)
            else f"this torch ({torch.__version__}) is not built for Intel GPUs; install one that is",
            f"{INTERPRETER_VARIABLE}=1 has the kernels run on the CPU, to test them",
        )
    try:
        import triton

        from . import interpreter, kernels
    except ImportError as error:
        return _unavailable(
            f"Triton cannot be imported ({error})",
            "a torch built for Intel GPUs brings it; for the interpreter and other GPUs pip install bnb_core[triton]",
        )
    if interpreted:
        interpreter.mend()
        device_type, place = "cpu", "Triton's interpreter, on the CPU"
    elif _sees("xpu"):
        device_type, place = "xpu", "Intel GPUs"
    else:
        device_type, place = "cuda", "GPUs of another maker"
    memory = PinnedMemory() if device_type == "xpu" else None
    paged = "none" if memory is None else "pinned host memory, which the GPU uses in place"
    return Backend(
        name="xpu",
        device_types=(device_type,),
        priority=100,
        kernels=kernels_of(LargeProducts(kernels)),
        by_name_only=device_type != "xpu",
        details=lambda: {"Triton": triton.__version__, "runs on": place, "paged memory": paged},
        paged_memory=memory,
    )


def _unavailable(reason: str, remedy: str) -> Backend:
    return Backend("xpu", ("xpu",), 100, {}, unavailable=f"{reason}; {remedy}")


def _sees(device_type: str) -> bool:
    return getattr(torch, device_type).device_count() > 0


backend = _make_backend()
