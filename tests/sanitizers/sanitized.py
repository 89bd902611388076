"""The package with its kernels built by a sanitizer, and Python with what such kernels need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sanitizers import new_format

import bnb_core

ROOT = Path(__file__).parents[2]
MEMORY = "address,undefined"
THREADS = "thread"
# The runtimes that must be loaded before the interpreter's own libraries.
RUNTIMES = {MEMORY: ("libasan.so", "libubsan.so"), THREADS: ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    # numpy's and torch's own libraries are not built for the thread sanitizer, nor is the OpenMP runtime.
    "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def build(sanitizer: str, folder: Path) -> Path:
    """The folder of the package; its sources are a copy of this checkout's, with one format more."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__"))
    new_format.add_to(source)
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=undefined -O1"
    options = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": f"-fsanitize={sanitizer}"}
    # HIP's kernels are CUDA's: they touch the same addresses, and a wave of 64 orders all that two warps of 32 do.
    sets = {"BNB_BUILD": "cpu,cuda-sim" if sanitizer == MEMORY else "cuda-sim"}
    # Only what can run here: each level is minutes of compilation.
    isas = {"BNB_CPU_ISAS": ";".join(bnb_core.backends()["cpu"].instruction_sets.available())}
    environment = {**os.environ, "CC": "gcc", "CXX": "g++", **options, **sets, **isas}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "package"), str(source)], env=environment, check=True)
    return folder / "package"


def run(folder: Path, sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, on the package in that folder."""
    find = ["gcc", "-print-file-name="]
    libraries = [
        subprocess.run([find[0], find[1] + name], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    environment = {
        **os.environ,
        **OPTIONS,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(libraries),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=3600)
