"""Kernels in Triton: as ``xpu`` for tensors on Intel GPUs, as ``triton`` for those of other makers.

A torch for a maker's GPUs brings Triton, so that they are served where no kernels are compiled for them. Compiled ones
come first (backends/cuda, backends/hip). By either name the kernels also run on the CPU, in Triton's interpreter
(TRITON_INTERPRET=1), to test them.

intel-extension-for-pytorch has 4-bit ops too. They are not used: that package is at its end of life, and its last
wheels are for CPUs or need an Intel GPU, so that the suite could not hold what they compute to docs/SPEC.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from bnb_core.backend import Backend, Kernel

from ..compiled_gpu import DEVICE_TYPE as OTHER_GPUS
from ..gpu import LargeProducts
from ..native import FILLING, IN_PLACE, kernels_of
from .host_compiler import why_no_host_compiler

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
FIRST, BELOW_COMPILED = 100, 50
"""Priorities; compiled kernels have the first as well."""

TRITON = "a torch built for GPUs brings it; for the interpreter pip install bnb_core[triton]"


@dataclass(frozen=True)
class Place:
    """What the kernels run on: torch's name for it, ours, and why there is none here (None where there is)."""

    device_type: str
    words: str
    missing: str | None = None


INTERPRETER = Place("cpu", "Triton's interpreter, on the CPU")


def _intel_gpus() -> Place:
    return Place("xpu", "Intel GPUs", None if torch.xpu.device_count() > 0 else _why_no_intel_gpu())


def _other_gpus() -> Place:
    seen = torch.cuda.device_count() > 0
    return Place(
        OTHER_GPUS,
        "GPUs of NVIDIA and AMD",
        None if seen else f"this torch ({torch.__version__}) sees no GPU of NVIDIA or AMD",
    )


def _make_backend(name: str, gpus: Place, priority: int) -> Backend:
    """Initializes no GPU, and imports Triton only where its kernels come first."""
    interprets = os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")
    place = INTERPRETER if interprets else gpus
    if place.missing is not None:
        hint = f"{INTERPRETER_VARIABLE}=1 has the kernels run on the CPU, to test them"
        return _unavailable(name, gpus, priority, f"{place.missing}; {hint}")
    is_first = interprets or not _are_compiled(place.device_type)
    reason = _why_no_triton(is_first) or (None if interprets else why_no_host_compiler())
    if reason is not None:
        return _unavailable(name, gpus, priority, *filter(None, (gpus.missing if interprets else None, reason)))
    return Backend(
        name=name,
        device_types=(place.device_type,),
        priority=priority,
        kernels=_kernels() if is_first else _with_first_calls(),
        by_name_only=interprets,
        details=lambda: _details(place, gpus),
        paged_memory=_paged_memory() if is_first and not interprets else None,
    )


def _unavailable(name: str, gpus: Place, priority: int, *reasons: str) -> Backend:
    return Backend(name, (gpus.device_type,), priority, {}, unavailable="; ".join(reasons))


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


def _are_compiled(device_type: str) -> bool:
    if device_type != OTHER_GPUS:
        return False
    from ..cuda import backend as cuda
    from ..hip import backend as hip

    return cuda.available or hip.available


def _why_no_triton(is_first: bool) -> str | None:
    """In words. Where other kernels come first it is only looked for."""
    try:
        if is_first:
            _kernels()
        elif find_spec("triton") is None:
            raise ImportError("No module named 'triton'")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {TRITON}"
    return None


@cache
def _kernels() -> dict[str, Kernel]:
    from . import kernels
    from .rows_alike import ROWS_ALIKE

    return kernels_of(LargeProducts(kernels), ROWS_ALIKE)


def _with_first_calls() -> dict[str, Callable[..., None]]:
    """The kernels by primitive; Triton is imported for one with its first call."""

    def with_first_call(primitive: str) -> Callable[..., None]:
        def call(*arguments: Any, **outputs: Any) -> None:
            _kernels()[primitive].function(*arguments, **outputs)

        return call

    return {primitive: with_first_call(primitive) for primitive in (*FILLING, *IN_PLACE)}


def _paged_memory() -> Any:
    """Compiled kernels, where they come first, have their own."""
    from .launch import touch
    from .pinned_memory import PinnedMemory

    return PinnedMemory(touch)


def _details(place: Place, gpus: Place) -> dict[str, str]:
    import triton

    facts = {"Triton": triton.__version__, "runs on": place.words}
    if place is gpus:
        return {**facts, "paged memory": "pinned host memory, which the GPU uses in place"}
    return {**facts, gpus.words: gpus.missing or "here, but the interpreter was asked for", "paged memory": "none"}


xpu = _make_backend("xpu", _intel_gpus(), FIRST)
triton = _make_backend("triton", _other_gpus(), BELOW_COMPILED)
