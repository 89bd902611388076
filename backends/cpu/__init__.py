"""The kernels in csrc_cpu, for tensors in host memory."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from bnb_core.registry import Backend, InstructionSets

from ..native import kernels_of, module_file
from .kernels import CpuKernels


def _load_kernels() -> ModuleType:
    """The compiled module, bound to the OpenMP runtime that torch itself runs on."""
    module = import_module("bnb_core.backends.cpu._kernels")
    module.set_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return module


def _unavailable_backend(reason: str) -> Backend:
    return Backend("cpu", ("cpu",), 0, {}, unavailable=reason)


def _make_backend() -> Backend:
    try:
        module = _load_kernels()
    except ImportError as error:
        return _unavailable_backend(
            f"its compiled kernels cannot be loaded ({error}); build them with `pip install .` and a C++17 compiler "
            "(Debian: apt-get install g++)"
        )
    except (ValueError, RuntimeError) as error:
        return _unavailable_backend(str(error))

    def details() -> dict[str, str]:
        return {
            "isa": module.isa(),
            "isas available": ", ".join(module.isas_available()),
            "isas built": ", ".join(module.isas_built()),
            "openmp": module.openmp_path(),
            "threads": str(torch.get_num_threads()),
        }

    return Backend(
        name="cpu",
        device_types=("cpu",),
        priority=100,
        kernels=kernels_of(CpuKernels(module, stream=lambda device: 0)),
        details=details,
        instruction_sets=InstructionSets(module.isas_available, module.isa, module.set_isa),
        library=module_file(module),
    )


backend = _make_backend()
