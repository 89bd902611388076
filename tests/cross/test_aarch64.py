"""The portable kernels, compiled for aarch64 and run under qemu, give the bits that they give on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from compilers import needs

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests" / "cross" / "kernel_hashes.cpp",
    ROOT / "csrc_cpu" / "targets" / "portable.cpp",
    ROOT / "csrc_cpu" / "machine.cpp",
    ROOT / "csrc_cpu" / "memory.cpp",
    ROOT / "csrc_cpu" / "threads.cpp",
]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-static", "-Wall", "-Wextra", "-Werror"]
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
KERNELS = 6
DTYPES = 3


def _hashes(compiler: str, program: Path, *runner: str) -> list[str]:
    command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True, timeout=600)
    run = subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True, timeout=600)
    return run.stdout.splitlines()


@needs(*TOOLS, remedy="apt-get install g++-aarch64-linux-gnu qemu-user")
def test_portable_kernels_give_the_same_bits_on_aarch64(tmp_path):
    here = _hashes("g++", tmp_path / "here")
    there = _hashes("aarch64-linux-gnu-g++", tmp_path / "there", "qemu-aarch64")
    assert len(set(here)) == KERNELS * DTYPES
    assert there == here
