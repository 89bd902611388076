"""The kernels in csrc_cpu, for tensors in host memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bnb_core.backend import Backend, InstructionSets, SettingError

from ..native import NativeKernels, kernels_of, module_file
from .kernels import CpuKernels
from .rows_alike import rows_alike

ISA_VARIABLE = "BNB_CPU_ISA"
LEVELS = (
    "portable",
    *("neon", "neon_dotprod", "neon_i8mm"),
    *("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"),
)
"""The instruction sets of csrc_cpu on all machines, ascending on each."""

OPENMP = {"darwin": "libtorch_cpu.dylib", "win32": "libiomp5md.dll"}
"""Which of torch's libraries has its OpenMP runtime, or depends on it; elsewhere it is libtorch_cpu.so."""


def _loaded_kernels(cap: str | None) -> ModuleType:
    """The compiled module, on an instruction set no higher than the cap and the OpenMP runtime that torch runs on."""
    module = import_module("bnb_core.backends.cpu._kernels")
    if cap is not None:
        module.set_isa(capped_level(cap, module.isas_available()))
    set_openmp(module)
    return module


def set_openmp(module: ModuleType) -> None:
    """Have the module run on the OpenMP runtime that torch runs on.

    Raises:
        RuntimeError: it is not found.
    """
    module.set_openmp(str(Path(torch.__file__).parent / "lib" / OPENMP.get(sys.platform, "libtorch_cpu.so")))


def level_cap() -> str | None:
    """The level that BNB_CPU_ISA names, None where it names none.

    Raises:
        SettingError: there is no such level.
    """
    cap = os.environ.get(ISA_VARIABLE)
    if cap and cap not in LEVELS:
        raise SettingError(ISA_VARIABLE, cap, f"one of {', '.join(LEVELS)}")
    return cap or None


def capped_level(cap: str, available: Sequence[str]) -> str:
    """The highest of the available levels up to the cap."""
    return next(level for level in reversed(LEVELS[: LEVELS.index(cap) + 1]) if level in available)


def _unavailable_backend(reason: str) -> Backend:
    return Backend("cpu", ("cpu",), 0, {}, unavailable=reason)


def _make_backend() -> Backend:
    cap = level_cap()
    try:
        module = _loaded_kernels(cap)
    except ImportError as error:
        return _unavailable_backend(
            f"its compiled kernels cannot be loaded ({error}); build them with `pip install .` and a C++17 compiler "
            "(Debian: apt-get install g++)"
        )
    except (ValueError, RuntimeError) as error:
        return _unavailable_backend(str(error))

    return Backend(
        name="cpu",
        priority=100,
        **served_by(module),
        details=lambda: {**facts(module), **({ISA_VARIABLE: f"{cap} at most"} if cap else {})},
    )


def served_by(module: ModuleType) -> dict[str, Any]:
    """What a Backend over the module is, whatever it is called."""
    return {
        "device_types": ("cpu",),
        "kernels": kernels_of(CpuKernels(NativeKernels(module, stream=lambda device: 0)), rows_alike(module.isa)),
        "instruction_sets": InstructionSets(module.isas_available, module.isa, module.set_isa),
        "library": module_file(module),
    }


def facts(module: ModuleType) -> dict[str, str]:
    return {
        "isa": module.isa(),
        "isas available": ", ".join(module.isas_available()),
        "isas built": ", ".join(module.isas_built()),
        "openmp": module.openmp_path(),
        "threads": str(torch.get_num_threads()),
    }


backend = _make_backend()
