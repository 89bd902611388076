"""The sdist and the wheel: what they hold, and that an instruction set's flags stay in its own object file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A pointer to data that exception handling needs; it is no code.
HARMLESS_WEAK_SYMBOL = "DW.ref.__gxx_personality_v0"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """Both, built from this checkout: the wheel from the sdist, as an index would serve it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, timeout=1200)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"bnb_core", "pytest_bnb_core.py"}
    assert not [name for name in names if re.search(r"\.(cpp|h|cu|cuh|o)$|/tests/|csrc", name)]
    assert [name for name in names if re.fullmatch(r"bnb_core/backends/cpu/_kernels\..*\.so", name)]
    for needed in ("conformance/suite/quantize.py", "cli/demo/command.py", "py.typed", "backends/reference/int8.py"):
        assert f"bnb_core/{needed}" in names


def test_the_sdist_holds_what_the_build_needs(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"setup.py", "constraints.txt", "csrc_shared/kernels.h", "csrc_cpu/dispatch.cpp", "LICENSE"} <= names


def test_the_wheel_works_where_it_is_installed(distributions, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*command, str(distributions[1])], check=True, timeout=600)
    code = "import bnb_core; print(bnb_core.__file__, bnb_core.backends()['cpu'].available)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert output.split() == [str(tmp_path / "bnb_core" / "__init__.py"), "True"]


def test_no_symbol_of_an_instruction_set_can_replace_anothers(tmp_path):
    """A weak symbol of an AVX-512 object may be the one that the linker keeps for everybody: SIGILL elsewhere."""
    environment = {**os.environ, "BNB_BUILD": "cpu"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=1200)
    objects = list(tmp_path.rglob("targets/*.o"))
    assert objects
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.search(r"\s[WwVvu]\s", line)]
        assert [line for line in weak if HARMLESS_WEAK_SYMBOL not in line] == [], path.name
