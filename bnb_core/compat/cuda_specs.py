"""``bitsandbytes.cuda_specs``: what torch knows of CUDA and of the GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "CUDASpecs",
    "get_compute_capabilities",
    "get_cuda_specs",
    "get_cuda_version_string",
    "get_cuda_version_tuple",
    "get_rocm_gpu_arch",
]

# The first with tensor cores for int8 are Turing's.
_FIRST_WITH_IMMA = (7, 5)


@dataclass(frozen=True)
class CUDASpecs:
    """The GPUs of a machine.

    Args:
        highest_compute_capability: major and minor, of the newest GPU.
        cuda_version_string: such as ``128``, of the CUDA or ROCm that torch is built for.
        cuda_version_tuple: the same as numbers.
    """

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether that GPU multiplies int8 on tensor cores; for ROCm, whether it is as new as its number says."""
        return torch.version.hip is not None or self.highest_compute_capability >= _FIRST_WITH_IMMA


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Of every GPU, ascending."""
    return sorted(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def get_cuda_version_tuple() -> tuple[int, int] | None:
    """Major and minor of the CUDA, or the ROCm, that torch is built for; None for neither."""
    version = torch.version.cuda or torch.version.hip
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """The same without a dot, such as ``128``."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """None where torch sees no GPU of CUDA or ROCm."""
    version, capabilities = get_cuda_version_tuple(), get_compute_capabilities()
    if version is None or not capabilities:
        return None
    return CUDASpecs(capabilities[-1], f"{version[0]}{version[1]}", version)


def get_rocm_gpu_arch() -> str:
    """Such as ``gfx90a``; ``unknown`` where torch sees no GPU of AMD."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return "unknown"
    return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
