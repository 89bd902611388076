"""Builds tests/cross/kernels.cpp for another machine or system, and judges what it prints there."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
PROGRAM = "tests/cross/kernels.cpp"
NOT_FOR_PYTHON = [f"csrc_cpu/{name}.cpp" for name in ("machine", "memory", "openmp", "threads")]
DISPATCH = "csrc_cpu/dispatch.cpp"
HASHES = 9 * 3
"""Of the groups of kernels with exact bits, for three dtypes."""
CHECKS = 4 * 3
"""Of the products, for three dtypes."""


def setup_on(machine: str, kernels: str = "cpu_kernels") -> dict[str, object]:
    """What setup.py defines on such a machine, and as "kernels" those that the function makes; nothing is built."""
    environment = {**os.environ, "BNB_BUILD": "cpu"}
    folder = os.getcwd()
    os.chdir(ROOT)
    try:
        with (
            mock.patch("setuptools.setup"),
            mock.patch("platform.machine", return_value=machine),
            mock.patch.dict(os.environ, environment),
        ):
            names = runpy.run_path("setup.py")
            return {**names, "kernels": names[kernels]()[0]}
    finally:
        os.chdir(folder)


def targets(setup: dict[str, object]) -> dict[str, list[str]]:
    """The source of each level with its flags."""
    return {source: flags for source, flags in setup["kernels"].source_flags.items() if "/targets/" in source}


def build(compiler: list[str], machine: str, folder: Path, static: bool = True) -> Path:
    """The program with the levels and the flags of a build for the machine; with the portable level for "unknown"."""
    setup = setup_on(machine)
    every_level = machine != "unknown"
    sources = {PROGRAM: ["-DBNB_ALL_LEVELS"] if every_level else []} | {source: [] for source in NOT_FOR_PYTHON}
    sources |= {DISPATCH: setup["kernels"].source_flags[DISPATCH]} if every_level else {}
    sources |= targets(setup)

    def compile_one(source: str) -> str:
        result = folder / Path(source).with_suffix(".o").name
        command = [*compiler, *setup["FLAGS"], *setup["WARNINGS"], *sources[source], "-c", source, "-o", str(result)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=600)
        return str(result)

    folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernels.exe"
    options = ["-static", "-ldl"] if static else []
    subprocess.run([*compiler, *objects, *options, "-o", str(program)], check=True, timeout=600)
    return program


def lines(*command: str, **variables: str) -> list[str]:
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=600, env={**os.environ, **variables}
    )
    return run.stdout.splitlines()


def assert_holds(there: list[str], here: list[str]) -> None:
    """What was printed there has the bits of the portable kernels here, and no product is off its bound."""
    exact = [line for line in here if "beyond" not in line]
    assert len(set(exact)) == HASHES
    assert [line for line in there if "beyond" not in line] == exact
    checks = [line for line in there if "beyond" in line]
    assert len(set(checks)) == CHECKS
    assert [line for line in checks if not re.search(r": 0 of [1-9]\d* elements beyond the bound$", line)] == []
