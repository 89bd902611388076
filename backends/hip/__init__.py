"""The kernels in csrc_cuda in HIP's names, for tensors on AMD GPUs."""

from __future__ import annotations

from ..compiled_gpu import GpuPlatform, make_backend

backend = make_backend(
    GpuPlatform(
        "hip",
        build="BNB_BUILD=cpu,hip pip install --no-build-isolation .",
        compiler="the hipcc of ROCm 6 or 7, beside the torch that translates them",
    )
)
