"""The CUDA kernels compile for every architecture without a warning or a spill, and their module needs no driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import needs

ROOT = Path(__file__).parents[2]
ARCHS = ("75", "80", "90", "100", "120")
MOST_REGISTERS = 255
LEAST_SUMS = 64
"""A thread's sums of one product on wgmma."""

pytestmark = needs("nvcc", remedy="install NVIDIA's CUDA toolkit")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the package with the CUDA kernels for all architectures, and what the assembler reported."""
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
    return folder / "package", run.stdout + run.stderr


def kernels(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and spilled bytes by kernel (its mangled name) and architecture, as ptxas reports them."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    current: tuple[str, str] | None = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            current = (match[1], match[2])
            found[current] = {}
        elif current is not None and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)):
            found[current] |= {"stack": int(match[1]), "spilled": int(match[2])}
        elif current is not None and (match := re.search(r"Used (\d+) registers", line)):
            found[current]["registers"] = int(match[1])
    return found


def test_every_architecture_compiles_without_a_warning(built):
    """Hopper's with its own instructions."""
    assert {arch for _, arch in kernels(built[1])} == {"90a" if arch == "90" else arch for arch in ARCHS}
    assert "warning" not in built[1].lower()


def test_products_on_wgmma_do_not_wait_for_one_another(built):
    """The assembler makes them wait, and says so, where it finds a use of their registers that may come too early."""
    registers = [
        use["registers"] for (kernel, arch), use in kernels(built[1]).items() if "wgmma" in kernel and arch == "90a"
    ]
    assert registers and min(registers) > LEAST_SUMS
    assert re.findall(r"\(C75\d\d\).*", built[1]) == []


def test_no_kernel_spills_registers(built):
    found = kernels(built[1])
    assert len(found) > 10 * len(ARCHS)
    assert {kernel: use for kernel, use in found.items() if use["spilled"] or use["registers"] > MOST_REGISTERS} == {}


def test_the_module_imports_without_a_driver_and_says_so(built):
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_kernels', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.driver_version(), module.archs)\n"
    )
    (library,) = built[0].rglob("_kernels*.so")
    run = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True)
    version, *archs = run.stdout.split()
    assert tuple(archs) == ARCHS
    if shutil.which("nvidia-smi") is None:
        assert version == "0"


def test_the_module_depends_on_no_installed_cuda(built):
    (library,) = built[0].rglob("_kernels*.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|cublas)", needed)
