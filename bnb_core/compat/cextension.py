"""``bitsandbytes.cextension``: the compiled library and what callers ask about it."""

from __future__ import annotations

import torch

from bnb_core.compat.c_library import lib

__all__ = ["BNB_BACKEND", "HIP_ENVIRONMENT", "lib"]

HIP_ENVIRONMENT = torch.version.hip is not None
BNB_BACKEND = "ROCm" if HIP_ENVIRONMENT else "CUDA" if torch.version.cuda else "XPU" if torch.version.xpu else "CPU"


def __getattr__(name: str) -> object:
    """Facts about the GPU, which importing this module does not initialize."""
    if name == "ROCM_GPU_ARCH":
        return _rocm_arch()
    if name == "ROCM_WARP_SIZE_64":
        return HIP_ENVIRONMENT and torch.cuda.is_available() and torch.cuda.get_device_properties(0).warp_size == 64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _rocm_arch() -> str:
    if not (HIP_ENVIRONMENT and torch.cuda.is_available()):
        return "unknown"
    return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
