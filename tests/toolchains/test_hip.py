"""The CUDA kernels in HIP's names: the renaming is complete and repeatable, and the result compiles for AMD's GPUs.

Debian's hipcc knows gfx90a and gfx1030 only; for newer chips clang-19 compiles against Debian's headers and device
libraries. Both are compile checks: no GPU runs what they make.
"""

from __future__ import annotations

import filecmp
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compilers import needs
from toolchains.conftest import CLANG_ARCHS, HIPCC_ARCHS, KERNEL_REPORT, needs_clang

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from csrc_hip import toolchain  # noqa: E402

# __CUDA_ARCH__ fences what is NVIDIA's alone: it is never defined here.
CUDA_NAMES = r"\bcuda\w*\b|\bCUDA\w*|__CUDA(?!_ARCH__)\w*|\bCUDART\w*|\b__nv_\w+|\bnv_bfloat\w*|\bcublas\w*|<<<"


@pytest.fixture(scope="session")
def hipified(tmp_path_factory) -> dict[str, Path]:
    return toolchain.hipify(tmp_path_factory.mktemp("hip") / "out")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def test_no_cuda_name_is_left(hipified):
    found = {
        name: names
        for name, path in hipified.items()
        if path.suffix != ".py" and (names := set(re.findall(CUDA_NAMES, without_comments(path.read_text()))))
    }
    assert found == {}


def test_every_source_is_renamed_once(hipified):
    sources = {
        f"csrc_cuda/{path.name}" for path in (ROOT / "csrc_cuda").iterdir() if path.suffix in (".cu", ".cpp", ".h")
    }
    assert {name for name in hipified if not name.endswith(".py")} == sources


def test_a_second_run_gives_the_same_files(hipified, tmp_path):
    again = toolchain.hipify(tmp_path / "out")
    assert list(again) == list(hipified)
    for name, path in hipified.items():
        assert filecmp.cmp(path, again[name], shallow=False), name


def test_renaming_leaves_the_sources_alone(hipified, tmp_path):
    before = {path: path.read_bytes() for path in (ROOT / "csrc_cuda").iterdir() if path.is_file()}
    toolchain.hipify(tmp_path / "out")
    assert {path: path.read_bytes() for path in (ROOT / "csrc_cuda").iterdir() if path.is_file()} == before


def compile_kernels(command: list[str], hipified: dict[str, Path], folder: Path) -> str:
    """Compile every file of device code; gives what the compiler reported of the kernels."""

    def report_of(path: Path) -> str:
        arguments = [KERNEL_REPORT, "-c", str(path), "-o", str(folder / f"{path.stem}.o")]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=1200)
        assert run.returncode == 0, f"{path.name}: {run.stderr[-4000:]}"
        assert "warning:" not in run.stderr, run.stderr[-4000:]
        return run.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "\n".join(pool.map(report_of, [path for path in toolchain.sources(hipified) if path.suffix != ".cpp"]))


def check_kernels(report: str, archs: int) -> None:
    """No kernel keeps registers in scratch memory."""
    scratch = re.findall(r"ScratchSize \[bytes/lane\]: (\d+)", report)
    assert len(scratch) > 10 * archs
    assert set(scratch) == {"0"}, re.findall(r"Function Name: (\w+)", report)


@needs("hipcc", remedy="apt-get install hipcc")
def test_hipcc_compiles_every_kernel_without_scratch(hipified, tmp_path):
    command = toolchain.compile_command(list(HIPCC_ARCHS), "kernels.hip")
    check_kernels(compile_kernels(command, hipified, tmp_path), len(HIPCC_ARCHS))


@needs_clang
def test_clang_compiles_every_kernel_for_newer_chips_without_scratch(hip_wheel):
    check_kernels(hip_wheel.report, len(CLANG_ARCHS))
