"""The kernels for aarch64, built by its cross compiler and run under qemu on processors with and without extensions.

What has the same bits on every machine has those of the portable kernels here, which the conformance suite holds to the
reference; products are held to their bounds by the program itself.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from compilers import needs
from cross.programs import assert_holds, build, lines, setup_on, targets

COMPILER = "aarch64-linux-gnu-g++"
LEVELS = {
    "cortex-a72": ["portable", "neon"],
    "neoverse-n1": ["portable", "neon", "neon_dotprod"],
    "max,pauth-impdef=on": ["portable", "neon", "neon_dotprod", "neon_i8mm"],
}
"""The levels of processors: ARMv8.0, dot products, and i8mm as well."""

needs_tools = needs(COMPILER, "qemu-aarch64", remedy="apt-get install g++-aarch64-linux-gnu qemu-user")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return build([COMPILER], "aarch64", tmp_path_factory.mktemp("there") / "build")


def test_builds_on_linux_and_on_macos_have_the_same_levels():
    linux, macos, other = (targets(setup_on(machine)) for machine in ("aarch64", "arm64", "riscv64"))
    assert linux == macos
    added = {Path(source).stem: flags for source, flags in linux.items() if source not in other}
    assert list(added) == ["neon", "neon_dotprod", "neon_i8mm"]
    assert all(flag.startswith("-march=armv8") for flags in added.values() for flag in flags)


@needs_tools
@pytest.mark.parametrize("processor", LEVELS)
def test_a_level_is_available_where_the_processor_has_its_extensions(program, processor):
    assert lines("qemu-aarch64", "-cpu", processor, str(program)) == LEVELS[processor]


@needs_tools
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
    assert_holds(lines("qemu-aarch64", "-cpu", processor, str(program), level), here)


@needs_tools
def test_targets_share_no_function(program):
    for path in sorted(program.parent.glob("neon*.o")):
        listing = lines("aarch64-linux-gnu-nm", "-C", str(path))
        weak = [line for line in listing if re.search(r"\s[WwVvu]\s", line)]
        assert [line for line in weak if "DW.ref.__gxx_personality_v0" not in line] == [], path.name
