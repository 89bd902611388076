"""Programs over the simulator, compiled for a test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SIMULATOR = HERE.parents[1] / "csrc_sim"
SIMULATOR_SOURCES = [source for source in sorted(SIMULATOR.glob("*.cpp")) if source.name != "module.cpp"]
KERNELS = [
    HERE / name for name in ("right.cu", "faults.cu", "asynchronous.cu", "hip.cu", "main.cpp")
] + SIMULATOR_SOURCES
FLAGS = [
    *("-std=c++17", "-g", "-O1", "-fPIC", "-pthread", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{SIMULATOR}", f"-I{SIMULATOR / 'include'}"),
]

COMPILERS = [compiler for compiler in ("g++", "clang++") if shutil.which(compiler)]
WARP_SIZES = (32, 64)
ORDERS = ("forward", "reverse", "shuffled:1")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def build(
    output: Path,
    sources: Sequence[Path] = KERNELS,
    compiler: str = "g++",
    flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
) -> Path:
    """Compile sources with the flags, and link them to ``output``."""
    folder = output.with_suffix(".objects")
    folder.mkdir()
    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [compiler, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    _run([compiler, *flags, *link_flags, "-pthread", "-o", str(output), *map(str, objects), "-ldl"])
    return output


def run(program: Path, case: str, warp_size: int, order: str) -> tuple[int, str]:
    """Run a case of main.cpp on two OS threads: its exit status and all that it wrote."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # fibers live as long as the process
    command = [str(program), case, str(warp_size), order, "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def fault_line(case: str) -> str:
    """Where faults.cu has the fault, as reports write it."""
    lines = (HERE / "faults.cu").read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, start=1) if text.endswith(f"// FAULT {case}")]
    return f"faults.cu:{line}"
