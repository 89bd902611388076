"""The CPU kernels under the address and undefined-behaviour sanitizers, held to the conformance suite.

Kernels that read a vector at a time are checked where it matters: at the ends of buffers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = "-fsanitize=address,undefined"


def _library(name: str) -> str:
    """The path of one of the compiler's runtime libraries."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    """A folder with the package whose kernels are built with the sanitizers."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc and its sanitizer runtimes are needed")
    folder = tmp_path_factory.mktemp("sanitized")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__"))
    flags = f"{SANITIZERS} -fno-sanitize-recover=undefined"
    options = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": SANITIZERS}
    environment = {**os.environ, "CC": "gcc", "CXX": "g++", **options}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "package")]
    subprocess.run([*command, str(source)], env=environment, check=True, timeout=1200)
    return folder / "package"


def _run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=1800)


def test_a_read_beyond_a_buffer_is_found(sanitized):
    """Of the absmax of dequantize_4bit, two scales short."""
    code = (
        "import torch; from bnb_core.backends.cpu import _kernels as k\n"
        "packed, out = torch.zeros(512, dtype=torch.uint8), torch.zeros(1024)\n"
        "absmax = torch.zeros(14)\n"
        "k.dequantize_4bit(packed.data_ptr(), absmax.data_ptr(), 1024, 64, 1, out.data_ptr(), 0, 0)\n"
    )
    run = _run(sanitized, "-c", code)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr


def test_the_conformance_suite_passes_at_every_instruction_set(sanitized):
    run = _run(sanitized, "-m", "bnb_core", "conformance", "--backend", "cpu", "--isa", "all")
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
