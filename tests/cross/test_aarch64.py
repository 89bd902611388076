"""The kernels for aarch64, built by its cross compiler and run under qemu on processors with and without extensions.

What has the same bits on every machine has those of the portable kernels here, which the conformance suite holds to the
reference; products are held to their bounds by the program itself.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from compilers import needs

ROOT = Path(__file__).parents[2]
PROGRAM = "tests/cross/kernels.cpp"
NOT_FOR_PYTHON = ["csrc_cpu/machine.cpp", "csrc_cpu/memory.cpp", "csrc_cpu/threads.cpp"]
TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
HASHES = 9 * 3
"""Of the groups of kernels with exact bits, for three dtypes."""
CHECKS = 4 * 3
"""Of the products, for three dtypes."""
LEVELS = {
    "cortex-a72": ["portable", "neon"],
    "neoverse-n1": ["portable", "neon", "neon_dotprod"],
    "max,pauth-impdef=on": ["portable", "neon", "neon_dotprod", "neon_i8mm"],
}
"""The levels of processors: ARMv8.0, dot products, and i8mm as well."""


def _setup(machine: str) -> dict[str, object]:
    """What setup.py defines on such a machine, and as "kernels" its CPU kernels; nothing is built."""
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
            return {**names, "kernels": names["cpu_kernels"]()[0]}
    finally:
        os.chdir(folder)


def _targets(setup: dict[str, object]) -> dict[str, list[str]]:
    """The source of each level with its flags."""
    return {source: flags for source, flags in setup["kernels"].source_flags.items() if "/targets/" in source}


def _build(compiler: str, sources: dict[str, list[str]], flags: list[str], folder: Path) -> Path:
    def compile_one(source: str) -> str:
        result = folder / Path(source).with_suffix(".o").name
        command = [compiler, *flags, *sources[source], "-c", source, "-o", str(result)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=600)
        return str(result)

    folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "kernels"
    subprocess.run([compiler, "-static", *objects, "-o", str(program), "-ldl"], check=True, timeout=600)
    return program


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.splitlines()


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> list[str]:
    """What the portable kernels print on this machine."""
    setup = _setup("unknown")
    sources = {source: [] for source in (PROGRAM, *NOT_FOR_PYTHON, "csrc_cpu/targets/portable.cpp")}
    folder = tmp_path_factory.mktemp("here") / "build"
    return _lines(str(_build("g++", sources, [*setup["FLAGS"], *setup["WARNINGS"]], folder)), "portable")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The same for aarch64, with the levels and the flags of a build there."""
    setup = _setup("aarch64")
    sources = {source: [] for source in (PROGRAM, *NOT_FOR_PYTHON, "csrc_cpu/dispatch.cpp")} | _targets(setup)
    folder = tmp_path_factory.mktemp("there") / "build"
    return _build("aarch64-linux-gnu-g++", sources, [*setup["FLAGS"], *setup["WARNINGS"]], folder)


def test_builds_on_linux_and_on_macos_have_the_same_levels():
    linux, macos, other = (_targets(_setup(machine)) for machine in ("aarch64", "arm64", "riscv64"))
    assert linux == macos
    added = {Path(source).stem: flags for source, flags in linux.items() if source not in other}
    assert list(added) == ["neon", "neon_dotprod", "neon_i8mm"]
    assert all(flag.startswith("-march=armv8") for flags in added.values() for flag in flags)


@needs(*TOOLS, remedy="apt-get install g++-aarch64-linux-gnu qemu-user")
@pytest.mark.parametrize("processor", LEVELS)
def test_a_level_is_available_where_the_processor_has_its_extensions(program, processor):
    assert _lines("qemu-aarch64", "-cpu", processor, str(program)) == LEVELS[processor]


@needs(*TOOLS, remedy="apt-get install g++-aarch64-linux-gnu qemu-user")
@pytest.mark.parametrize(
    ("processor", "level"),
    [
        ("cortex-a72", "portable"),
        ("cortex-a72", "neon"),
        ("neoverse-n1", "neon_dotprod"),
        ("max,pauth-impdef=on", "neon_i8mm"),
    ],
)
def test_every_level_gives_the_same_bits_and_products_within_their_bounds(here, program, processor, level):
    there = _lines("qemu-aarch64", "-cpu", processor, str(program), level)
    exact = [line for line in here if "beyond" not in line]
    assert len(set(exact)) == HASHES
    assert [line for line in there if "beyond" not in line] == exact
    checks = [line for line in there if "beyond" in line]
    assert len(set(checks)) == CHECKS
    assert [line for line in checks if not re.search(r": 0 of [1-9]\d* elements beyond the bound$", line)] == []


@needs(*TOOLS, remedy="apt-get install g++-aarch64-linux-gnu qemu-user")
def test_targets_share_no_function(program):
    for path in sorted(program.parent.glob("neon*.o")):
        listing = _lines("aarch64-linux-gnu-nm", "-C", str(path))
        weak = [line for line in listing if re.search(r"\s[WwVvu]\s", line)]
        assert [line for line in weak if "DW.ref.__gxx_personality_v0" not in line] == [], path.name
