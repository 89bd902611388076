"""The CUDA and the HIP kernels as their compilers make them, once for all tests that look at them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from compilers import needs
from wheel_builds import Built, build

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from csrc_hip import device_libraries  # noqa: E402

ARCHS = ("75", "80", "90")
"""One for each way through the sources (test_cuda.py): 100 goes that of the PTX for 90, and 120 that of 80."""
HIPCC_ARCHS = ("gfx90a", "gfx1030")
"""Debian's hipcc knows no newer ones."""
CLANG_ARCHS = ("gfx942", "gfx1201")
KERNEL_REPORT = "-Rpass-analysis=kernel-resource-usage"

needs_clang = needs(
    "hipcc", "clang++-19", "lld-19", "clang-offload-bundler-19",
    remedy="apt-get install hipcc clang-19 lld-19 clang-tools-19",
)  # fmt: skip


@dataclass(frozen=True)
class CudaBuild:
    package: Path
    """The folder of the package with the kernels."""
    objects: Path
    archs: tuple[str, ...]
    report: str
    """What the compiler and the assembler said."""


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> CudaBuild:
    folder = tmp_path_factory.mktemp("cuda")
    environment = {
        **os.environ,
        "BNB_BUILD": "cuda",
        "BNB_CUDA_ARCHS": ";".join(ARCHS),
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
    }
    arguments = ["--build-temp", str(folder / "objects"), "--build-lib", str(folder / "package")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return CudaBuild(folder / "package", folder / "objects", ARCHS, run.stdout + run.stderr)


@pytest.fixture(scope="session")
def hip_wheel(tmp_path_factory) -> Built:
    """A wheel of the HIP kernels, by the compiler of a release; in its report is what each kernel takes."""
    libraries = tmp_path_factory.mktemp("bitcode")
    device_libraries.write(libraries, list(CLANG_ARCHS))
    return build(
        tmp_path_factory.mktemp("hip"),
        BNB_BUILD="hip",
        BNB_HIP_ARCHS=";".join(CLANG_ARCHS),
        HIPCXX=f"clang++-19 --rocm-path=/usr --rocm-device-lib-path={libraries} {KERNEL_REPORT}",
    )
