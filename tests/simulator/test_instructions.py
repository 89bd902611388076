"""Faults that stop a program on a machine with AVX-512 and AMX are found in their simulation, too."""

from __future__ import annotations

import signal
import subprocess

import pytest
from compilers import needs
from simulator.build import HERE, SIMULATOR, build

pytestmark = needs("g++", remedy="apt-get install g++")
FAULTS = (
    "an aligned load that is not",
    "an aligned store that is not",
    "a load into a tile that was never configured",
    "a store from a tile that was released",
    "a tile of 17 rows",
    "a tile whose rows are no whole words",
)
"""By the cases of instructions.cpp, from 1 on."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    flags = ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f"-I{SIMULATOR / 'x86'}"]
    return build(tmp_path_factory.mktemp("program") / "instructions", [HERE / "instructions.cpp"], flags=flags)


def _run(program, case: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), str(case)], capture_output=True, text=True, timeout=60)


def test_a_right_program_ends(program):
    assert _run(program, 0).stdout == "done\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_program(program, fault):
    result = _run(program, 1 + FAULTS.index(fault))
    assert (result.returncode, result.stdout) == (-signal.SIGILL, "")
