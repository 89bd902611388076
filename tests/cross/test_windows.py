"""The kernels for Windows, built by Zig and run under Wine: every level that this machine has, on threads as well.

OPENMP_OF_WINDOWS names torch's runtime there, the libiomp5md.dll of its wheel for Windows.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cross.programs import assert_holds, build, lines

import bnb_core

COMPILER = [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-windows-gnu"]
WINE = next(filter(None, map(shutil.which, ("wine64", "wine", "/usr/lib/wine/wine64"))), None)
HAS_ZIG = find_spec("ziglang") is not None
LEVELS = [
    level
    for level in bnb_core.backends()["cpu"].instruction_sets.available()
    if level != "amx"  # Windows is not asked for tiles
]
QUIET = {"WINEDEBUG": "-all", "OMP_NUM_THREADS": "3", "KMP_AFFINITY": "disabled"}
"""Wine knows no affinity."""

pytestmark = pytest.mark.skipif(
    WINE is None or not HAS_ZIG, reason="needs Zig and Wine: pip install ziglang, apt-get install wine64"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return build(COMPILER, "AMD64", tmp_path_factory.mktemp("there") / "build", static=False)


@pytest.fixture(scope="module")
def run(program, tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("wine"))
    return lambda *arguments: lines(WINE, str(program), *arguments, WINEPREFIX=prefix, **QUIET)


def test_windows_has_the_levels_of_the_machine(run):
    assert run() == LEVELS


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_same_bits_and_products_within_their_bounds(here, run, level):
    assert_holds(run(level), here)


@pytest.mark.skipif(
    "OPENMP_OF_WINDOWS" not in os.environ, reason="OPENMP_OF_WINDOWS names no libiomp5md.dll of torch's wheel"
)
@pytest.mark.parametrize("level", LEVELS)
def test_torchs_threads_change_no_bit(here, run, level):
    assert_holds(run(level, os.environ["OPENMP_OF_WINDOWS"]), here)
