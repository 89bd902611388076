"""A backend over the GPU kernels compiled for one maker's GPUs, or the reason why it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnb_core.backend import Backend, Kernel
from bnb_core.records import flat

from .gemm_4bit_kernel import ask_for_kernel
from .gpu import COMPILED_ROWS_ALIKE, GpuKernels
from .managed_memory import ManagedMemory
from .native import NativeKernels, kernels_of, module_file

DEVICE_TYPE = "cuda"
"""What torch calls the GPUs of NVIDIA and, in its ROCm builds, those of AMD."""

MAKERS = {"cuda": "NVIDIA", "hip": "AMD"}
"""Whose GPUs a build of torch is for, by the field of torch.version that it has set; our backends have these names."""


@dataclass(frozen=True)
class GpuPlatform:
    """One maker's GPUs, by a name of MAKERS, and what compiles the kernels for them: a command and a compiler.

    A minor version counts ``minor`` in the numbers of the maker's versions, a major one a hundred times as much.
    ``chips`` names this machine's as the module's ``archs`` does, or none where they are not known; it wakes no GPU.
    """

    name: str
    build: str
    compiler: str
    minor: int
    chips: Callable[[], list[str]] = list

    @property
    def maker(self) -> str:
        return MAKERS[self.name]


def make_backend(platform: GpuPlatform) -> Backend:
    """The backend over ``bnb_core.backends.NAME._kernels``. Making it initializes no GPU.

    Raises:
        SettingError: BNB_GEMM_4BIT_KERNEL names no kernel.
    """
    others = _other_maker(platform)
    if others is not None:
        return _unavailable(platform, others)
    try:
        module = import_module(f"bnb_core.backends.{platform.name}._kernels")
    except ImportError as error:
        return _unavailable(
            platform,
            f"its kernels are not built ({error}); {platform.build} builds them with {platform.compiler}",
        )
    reason = _why_unavailable(platform, module)
    if reason is not None:
        return _unavailable(platform, reason)
    ask_for_kernel(module)
    kernels = GpuKernels(NativeKernels(module, current_stream))
    return Backend(
        name=platform.name,
        device_types=(DEVICE_TYPE,),
        priority=100,
        kernels={name: _on_its_device(kernel) for name, kernel in kernels_of(kernels, COMPILED_ROWS_ALIKE).items()},
        details=lambda: {
            "built for": module.archs,
            "driver": _version(platform, module.driver_version()),
            "runtime": _runtime(platform, module),
        },
        paged_memory=ManagedMemory(module, current_stream),
        library=module_file(module),
    )


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


def _unavailable(platform: GpuPlatform, reason: str) -> Backend:
    return Backend(platform.name, (DEVICE_TYPE,), 100, {}, unavailable=reason)


def _other_maker(platform: GpuPlatform) -> str | None:
    """That torch is built for somebody else's GPUs, which it calls by the same device type."""
    for name, maker in MAKERS.items():
        version = getattr(torch.version, name)
        if name != platform.name and version is not None:
            return f"this torch is built for {maker} ({name} {version}); its backend is {name!r}"
    return None


def _why_unavailable(platform: GpuPlatform, module: ModuleType) -> str | None:
    missing: str | None = module.missing_runtime()
    if missing is not None:
        return missing
    if module.driver_version() == 0:
        return f"no {platform.maker} driver is installed"
    if getattr(torch.version, platform.name) is None:
        return f"this torch ({torch.__version__}) is not built for {platform.maker}'s GPUs; install a torch that is"
    if torch.cuda.device_count() == 0:
        return f"torch sees no {platform.maker} GPU"
    chips = platform.chips()
    if chips and not any(arch.partition(":")[0] in chips or "generic" in arch for arch in module.archs.split()):
        return (
            f"its kernels are built for {module.archs}, and this machine has {' '.join(chips)}; {platform.build} "
            f"builds them for that with {platform.compiler}"
        )
    return None


def _version(platform: GpuPlatform, number: int) -> str:
    """NVIDIA's 13020 is 13.2, and AMD's 60342134 is 6.3."""
    return f"{number // platform.minor // 100}.{number // platform.minor % 100}"


def _runtime(platform: GpuPlatform, module: ModuleType) -> str:
    version, path = _version(platform, module.runtime_version()), module.runtime_path()
    return version if path is None else f"{version} ({path})"


def _on_its_device(kernel: Kernel) -> Kernel:
    """Run a kernel with the device of its tensors as the current one; where there is one GPU, it always is."""
    if torch.cuda.device_count() == 1:
        return kernel

    def on_device(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def call(*arguments: Any, **outputs: Any) -> None:
            first = next(argument for argument in flat(arguments) if isinstance(argument, Tensor | list))
            with torch.cuda.device((first[0] if isinstance(first, list) else first).device):
                function(*arguments, **outputs)

        return call

    several = None if kernel.several is None else on_device(kernel.several)
    return replace(kernel, function=on_device(kernel.function), several=several)
