"""The kernels in csrc_cuda in HIP's names, for tensors on AMD GPUs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..compiled_gpu import GpuPlatform, make_backend

DRIVERS_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where AMD's driver for Linux describes each GPU and, with a version of 0, each CPU."""


def chips(nodes: Path = DRIVERS_NODES) -> list[str]:
    """This machine's, such as gfx90a; none where the driver does not say, or is told to take one for another."""
    if "HSA_OVERRIDE_GFX_VERSION" in os.environ:
        return []
    try:
        texts = [path.read_text() for path in nodes.glob("*/properties")]
    except OSError:
        return []
    versions = {
        int(number) for text in texts for number in re.findall(r"^gfx_target_version (\d+)$", text, re.MULTILINE)
    }
    return [f"gfx{each // 10_000}{each // 100 % 100:x}{each % 100:x}" for each in sorted(versions) if each]


backend = make_backend(
    GpuPlatform(
        "hip",
        build="BNB_BUILD=cpu,hip pip install --no-build-isolation .",
        compiler="the hipcc of ROCm 6 or 7, beside the torch that translates them",
        minor=100_000,
        chips=chips,
    )
)
