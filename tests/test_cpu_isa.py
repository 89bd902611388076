"""Environment variables with a value: what can be used is, and what cannot be used is an error that says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from cross.programs import DISPATCH, setup_on, targets
from fresh_python import QUANTIZE, run_python

import bnb_core
from bnb_core.backend import SettingError
from bnb_core.backends import cpu
from bnb_core.backends.sim import gpu as sim

ROOT = Path(__file__).parents[1]
AVAILABLE = bnb_core.backends()["cpu"].instruction_sets.available()

sys.path.append(str(ROOT))
from csrc_hip import device_libraries  # noqa: E402
from csrc_hip import toolchain as hip  # noqa: E402
from csrc_shared.environment import listed  # noqa: E402


def test_the_levels_are_those_of_the_build_in_its_order():
    built = import_module("bnb_core.backends.cpu._kernels").isas_built()
    assert built == [level for level in cpu.LEVELS if level in built]


@pytest.mark.parametrize(
    ("cap", "available", "serves"),
    [
        ("amx", ["portable", "avx2", "avx512"], "avx512"),
        ("amx", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"], "avx512_bf16"),
        ("avx512_vnni", ["portable", "avx2"], "avx2"),
        ("avx2", ["portable", "avx2", "avx512"], "avx2"),
        ("avx2", ["portable"], "portable"),
        ("portable", ["portable", "avx2"], "portable"),
        ("neon_dotprod", ["portable", "neon", "neon_dotprod", "neon_i8mm"], "neon_dotprod"),
        ("neon_i8mm", ["portable", "neon"], "neon"),
        ("neon", ["portable", "avx2"], "portable"),
    ],
)
def test_a_cap_means_the_best_level_up_to_it(cap, available, serves):
    assert cpu.capped_level(cap, available) == serves


def test_info_says_which_level_serves_under_a_cap_that_the_machine_lacks():
    program = [sys.executable, "-m", "bnb_core", "info", "--json"]
    environment = {**os.environ, "BNB_CPU_ISA": cpu.LEVELS[-1]}
    facts = json.loads(subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout)
    assert facts["backends"]["cpu"]["details"]["isa"] == AVAILABLE[-1]
    assert facts["backends"]["cpu"]["details"]["BNB_CPU_ISA"] == f"{cpu.LEVELS[-1]} at most"
    assert facts["serving"]["gemm_4bit"]["cpu"] == "cpu"


def test_an_unknown_level_is_an_error_at_first_use_that_lists_those_there_are():
    code = f"import bnb_core\nprint('imported')\n{QUANTIZE}"
    result = run_python(code, BNB_CPU_ISA="AVX2")
    assert result.stdout.split() == ["imported"]
    expected = f"BNB_CPU_ISA: expected one of {', '.join(cpu.LEVELS)}, got 'AVX2'"
    assert result.stderr.splitlines()[-1] == f"bnb_core.backend.SettingError: {expected}"


@pytest.mark.parametrize("command", [["info"], ["bench", "--size", "64"], ["conformance"]])
def test_commands_refuse_an_unknown_level_in_one_line(command):
    environment = {**os.environ, "BNB_CPU_ISA": "mmx"}
    result = subprocess.run(
        [sys.executable, "-m", "bnb_core", *command], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"Error: BNB_CPU_ISA: expected one of {', '.join(cpu.LEVELS)}, got 'mmx'\n"


@pytest.mark.parametrize("value", ["", "portable"])
def test_a_level_that_can_be_used_is_read(monkeypatch, value):
    monkeypatch.setenv(cpu.ISA_VARIABLE, value)
    assert cpu.level_cap() == (value or None)


@pytest.mark.parametrize("value", ["abc", "16", "64.0", " 32"])
def test_a_warp_of_another_size_is_an_error_that_names_the_variable(monkeypatch, value):
    monkeypatch.setenv(sim.WARP_VARIABLE, value)
    with pytest.raises(SettingError, match=f"BNB_SIM_WARP: expected 32 or 64, got '{value}'"):
        sim._warp_size(32)


def test_a_warp_is_as_the_variable_says_and_without_it_the_default(monkeypatch):
    monkeypatch.setenv(sim.WARP_VARIABLE, "64")
    assert sim._warp_size(32) == 64
    monkeypatch.setenv(sim.WARP_VARIABLE, "")
    assert sim._warp_size(32) == 32


def test_a_variable_lists_names_for_the_build(monkeypatch):
    for text, names in (("cpu, cuda,cpu", ["cpu", "cuda"]), ("cpu,", ["cpu"]), ("", []), (" ", [])):
        monkeypatch.setenv("BNB_BUILD", text)
        assert listed("BNB_BUILD", ",", "cpu") == names
    monkeypatch.delenv("BNB_BUILD")
    assert listed("BNB_BUILD", ",", "cpu") == []


def test_a_list_without_a_name_is_an_error(monkeypatch):
    monkeypatch.setenv("BNB_CUDA_ARCHS", ";;")
    with pytest.raises(SystemExit, match="BNB_CUDA_ARCHS: expected names separated by ';', such as 80;90, got ';;'"):
        listed("BNB_CUDA_ARCHS", ";", "80;90")


@pytest.mark.parametrize("value", ["gfx90a,gfx1100", "90a", "gfx90a:xnack"])
def test_what_is_no_chip_of_amds_is_an_error_before_anything_is_compiled(monkeypatch, value):
    monkeypatch.setenv("BNB_HIP_ARCHS", value)
    with pytest.raises(SystemExit, match=f"BNB_HIP_ARCHS: expected names of chips .*, got '{value}'"):
        hip.archs()


def test_a_compiler_of_hip_that_is_named_and_missing_is_an_error(monkeypatch):
    monkeypatch.setenv("HIPCXX", "no-such-clang --rocm-path=/usr")
    with pytest.raises(
        SystemExit, match="HIPCXX: expected a compiler and its flags, but 'no-such-clang' was not found"
    ):
        hip.compiler()


@pytest.mark.parametrize("chip, version", [("gfx90a", 9010), ("gfx942:xnack+", 9402), ("gfx1201", 12001)])
def test_amds_device_libraries_know_a_chip_by_a_number(chip, version):
    """Debian's file for gfx90a says 9010."""
    assert device_libraries.isa_version(chip) == version


def test_chips_of_amds_may_have_features(monkeypatch):
    monkeypatch.setenv("BNB_HIP_ARCHS", "gfx90a:sramecc+:xnack-;gfx11-generic")
    assert hip.archs() == ["gfx90a:sramecc+:xnack-", "gfx11-generic"]


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("BNB_BUILD", "cpu,gpu", "some of cpu, cpu-sim, cuda, cuda-sim, hip, hip-sim, got 'gpu'"),
        ("BNB_CPU_ISAS", "portable;sse", "some of portable(;[a-z0-9_]+)*, got 'sse'"),
    ],
)
def test_what_cannot_be_built_is_an_error_that_lists_what_can(variable, value, accepted):
    command = [sys.executable, "setup.py", "--name"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, variable: value}, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(f"{variable}: expected {accepted}", result.stderr.splitlines()[-1])


def test_simulated_instruction_sets_are_compiled_for_avx2_alone():
    sources = targets(setup_on("x86_64", "simulated_cpu_kernels"))
    flags = {Path(source).stem: flags for source, flags in sources.items()}
    assert list(flags) == ["portable", *(level for level in cpu.LEVELS if level.startswith(("avx512", "amx")))]
    used = {flag for each in flags.values() for flag in each if flag.startswith("-m")}
    assert used == {"-mavx2", "-mfma", "-mf16c"}


@pytest.mark.parametrize(("machine", "isas"), [("aarch64", ""), ("x86_64", "avx2")])
def test_a_simulation_of_nothing_is_an_error(monkeypatch, machine, isas):
    monkeypatch.setenv("BNB_CPU_ISAS", isas)
    with pytest.raises(SystemExit, match="cpu-sim simulates instruction sets of x86-64 from avx512 on, and none is"):
        setup_on(machine, "simulated_cpu_kernels")


def test_the_instruction_sets_that_are_named_are_built_in_their_order_after_portable_code(monkeypatch):
    monkeypatch.setenv("BNB_CPU_ISAS", "avx512;avx2;avx512")
    setup = setup_on("x86_64")
    assert [Path(source).stem for source in targets(setup)] == ["portable", "avx2", "avx512"]
    table = ["-DBNB_ISAS=BNB_ISA(portable) BNB_ISA(avx2) BNB_ISA(avx512)"]
    assert setup["kernels"].source_flags[DISPATCH] == table
