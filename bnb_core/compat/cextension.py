"""``bitsandbytes.cextension``: the compiled library and what callers ask about it."""

from __future__ import annotations

import torch

from bnb_core.compat.c_library import CLibrary as BNBNativeLibrary
from bnb_core.compat.c_library import lib
from bnb_core.compat.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from bnb_core.compat.cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_tuple, get_rocm_gpu_arch

__all__ = [
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "BNBNativeLibrary",
    "CUDASpecs",
    "get_cuda_specs",
    "get_cuda_version_tuple",
    "get_native_library",
    "get_rocm_gpu_arch",
    "lib",
]

HIP_ENVIRONMENT = torch.version.hip is not None


def get_native_library() -> BNBNativeLibrary:
    """``lib``, whose symbols are those of the backend that serves when they are looked up."""
    return lib


def __getattr__(name: str) -> object:
    """Facts about the GPU, which importing this module does not initialize."""
    if name == "BNB_BACKEND":
        if HIP_ENVIRONMENT:
            return "ROCm"
        return "CUDA" if torch.cuda.is_available() else "XPU" if torch.xpu.is_available() else "CPU"
    if name == "ROCM_GPU_ARCH":
        return get_rocm_gpu_arch()
    if name == "ROCM_WARP_SIZE_64":
        return HIP_ENVIRONMENT and torch.cuda.is_available() and torch.cuda.get_device_properties(0).warp_size == 64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
