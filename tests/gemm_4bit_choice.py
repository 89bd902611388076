"""The choice of a kernel for products with a 4-bit weight, as csrc_cuda makes it, in a program of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc_cuda"
KERNELS = re.findall(r"^  kernel\((\w+)\)", (SOURCES / "gemm_4bit_kernels.h").read_text(), re.MULTILINE)

PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "choices.h"

int main(int, char** a) {
  const auto takes = [&](bnb::Gemm4bitKernel kernel) { return static_cast<int>(kernel) != std::atoi(a[4]); };
  const auto kernel = bnb::choose_gemm_4bit(bnb::kGemm4bitChoices, std::atoi(a[1]), std::atoll(a[2]),
                                            std::atoll(a[3]), takes);
  std::puts(bnb::kGemm4bitKernelNames[static_cast<int>(kernel)]);
}
"""


def program(folder: Path, table: str) -> Callable[..., str]:
    """What serves a product by this table: ``(chip, M, weights, not_taken=None)`` gives the kernel's name."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "choices.h").write_text(table)
    (folder / "choice.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-I", str(SOURCES), "-I", str(folder)]
    subprocess.run([*command, str(folder / "choice.cpp"), "-o", str(folder / "choice")], check=True)

    def choice(chip: int, M: int, weights: int, not_taken: str | None = None) -> str:
        number = -1 if not_taken is None else KERNELS.index(not_taken)
        arguments = [str(folder / "choice"), *map(str, (chip, M, weights, number))]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()

    return choice
