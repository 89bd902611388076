"""The simulator of csrc_sim under the sanitizers: they are told enough to find what it does not see itself, and
nothing that is not there."""

from __future__ import annotations

import pytest
from compilers import needs
from simulator.build import ORDERS, WARP_SIZES, build, fault_line, run

BUILDS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}

FOUND = {
    "device_memory_out_of_bounds": ("address", "heap-buffer-overflow"),
    "dynamic_shared_memory_out_of_bounds": ("address", "heap-buffer-overflow"),
    "static_shared_memory_out_of_bounds": ("address", "index 64 out of bounds"),
    "missing_barrier": ("thread", "data race"),
    "order_taken_for_granted": ("thread", "data race"),
    "race_in_a_block": ("thread", "data race"),
    "race_between_warps": ("thread", "data race"),
    "race_between_blocks": ("thread", "data race"),
}
"""Faults with the build that finds each, and what it says."""

THROWN = 4

pytestmark = needs("g++", remedy="apt-get install g++, with its sanitizer runtimes")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulator")
    return {name: build(folder / name, flags=flags) for name, flags in BUILDS.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_without_a_fault_pass(programs, name, warp_size, order):
    assert run(programs[name], "right", warp_size, order) == (0, "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warp_size", WARP_SIZES)
@pytest.mark.parametrize("case", FOUND)
def test_a_fault_is_found_at_its_line(programs, case, warp_size, order):
    name, words = FOUND[case]
    status, output = run(programs[name], case, warp_size, order)
    assert status != 0
    assert words in output
    assert fault_line(case) in output


@pytest.mark.parametrize("name", BUILDS)
def test_a_fault_that_the_simulator_reports_ends_cleanly(programs, name):
    """The threads that waited are unwound, and the kernels that follow pass."""
    status, output = run(programs[name], "thread_missing_at_a_barrier", 32, "forward")
    assert status == THROWN, output
    assert "Sanitizer" not in output
