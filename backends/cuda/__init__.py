"""The kernels in csrc_cuda, for tensors on NVIDIA GPUs."""

from __future__ import annotations

from ..compiled_gpu import GpuPlatform, make_backend

backend = make_backend(
    GpuPlatform("cuda", build="BNB_BUILD=cpu,cuda pip install .", compiler="nvcc 11.8 or newer", minor=10)
)
