"""A 4-bit format is a row in each of three tables: one is added to a copy of the source, built, and held to the suite.

What CONTRIBUTING.md says of adding a format is what happens here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VALUES = [step / 8 for step in range(-7, 9)]
"""Evenly spaced, ascending, with a code for 0.0 and one for 1.0: no format of ours."""
CODES = ", ".join(map(str, VALUES))

ROWS = {
    "bnb_core/formats.py": (
        "FORMATS = {each.name: each for each in (FP4, NF4)}",
        f"EVEN4 = Format4bit('even4', ({CODES}), Encoder.NEAREST, zero=7)\n"
        "FORMATS = {each.name: each for each in (FP4, NF4, EVEN4)}",
    ),
    "csrc_shared/formats.h": (
        "enum class QuantType : int32_t { fp4 = 0, nf4 = 1 };",
        "enum class QuantType : int32_t { fp4 = 0, nf4 = 1, even4 = 2 };",
        "     0x1.a374b0p+0f},\n};",
        "     0x1.a374b0p+0f},\n"
        f'    {{"even4", QuantType::even4, {{{CODES}}}, Encoder::nearest, 7, 1.0f, 1.0f}},\n}};',
    ),
    "bnb_core/conformance/oracle.py": (
        '    "fp4": Format4bit(',
        f'    "even4": Format4bit(_f32({CODES}), _codes),\n    "fp4": Format4bit(',
    ),
}
"""What stands in each file, and what stands there with the format, in turn."""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of the package that is built with the format, its sources seen by the build alone."""
    folder = tmp_path_factory.mktemp("format")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__"))
    for name, replacements in ROWS.items():
        file = source / name
        text = file.read_text()
        for before, after in zip(replacements[::2], replacements[1::2], strict=True):
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        file.write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "BNB_BUILD": "cpu,sim", "CXXFLAGS": "-O1"}  # the bits are the same, and sooner there
    target = folder / "package"
    subprocess.run([*command, "--target", str(target), str(source)], env=environment, check=True, timeout=1200)
    return target


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda-sim", "hip-sim"])
def test_the_suite_holds_a_new_format_to_the_contract(package, backend):
    command = [sys.executable, "-m", "bnb_core", "conformance", "--backend", backend, "--case", "*even4*"]
    if backend == "cpu":
        command += ["--isa", "all"]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd=package,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 failed" in run.stdout and " 0 passed" not in run.stdout


def test_layers_and_checkpoints_take_it(package):
    code = """
import torch, bnb_core
torch.manual_seed(0)
options = dict(quant_type="even4", compute_dtype=torch.float32, compress_statistics=False)
layer = bnb_core.nn.Linear4bit(64, 32, **options)
weight = layer.weight.data.clone()
layer.to("cpu")
again = bnb_core.nn.Linear4bit(64, 32, **options)
again.load_state_dict(layer.state_dict())
x = torch.randn(3, 64)
assert torch.equal(layer(x), again(x))
error = (bnb_core.functional.dequantize_4bit(layer.weight, layer.weight.quant_state) - weight).abs().max()
farthest = weight.abs().max() / 8  # of the least weight from the least code, and a rounding to f32
assert error <= farthest * 1.000001, error
"""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=package, check=True, timeout=300)
