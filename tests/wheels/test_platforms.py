"""One wheel for every Python and for old Linuxes: checked by the tools that say so, and by each Python at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from compilers import needs
from wheel_builds import ROOT, TORCHS_GLIBC, build, build_environment, repaired

HERE = Path(__file__).parent
MINORS = range(10, 15)
"""Of the Pythons 3.x that the wheel is for."""

CROSS_COMPILER = "aarch64-linux-gnu-g++"


def interpreter(minor: int) -> str | None:
    """One that starts, by its own file: on the PATH, or of pyenv, whose commands on the PATH need not."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python3.{minor}"), *sorted(versions.glob(f"3.{minor}.*/bin/python3.{minor}"))]
    for path in filter(None, found):
        run = subprocess.run([path, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.strip()
    return None


def oldest_glibc(wheel: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"manylinux_(\d+)_(\d+)", wheel.name)[0])


@pytest.fixture(scope="module")
def unpacked(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(released) as wheel:
        wheel.extractall(folder)
    return folder


FREE_THREADED = next(filter(None, (shutil.which(f"python3.{minor}t") for minor in (13, 14))), None)


@pytest.mark.skipif(FREE_THREADED is None, reason="no python3.13t or python3.14t on the PATH")
def test_a_free_threaded_python_builds_kernels_that_leave_its_lock_off(sdist, tmp_path):
    environment, folder = tmp_path / "environment", tmp_path / "unpacked"
    subprocess.run([FREE_THREADED, "-m", "venv", str(environment)], check=True, timeout=300)
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "setuptools>=77"], check=True, timeout=300)
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sdist)]
    subprocess.run(wheel, check=True, timeout=1200, env=build_environment())
    with zipfile.ZipFile(next(tmp_path.glob("*t-linux_*.whl"))) as built:
        built.extractall(folder)
    (kernels,) = folder.glob("bnb_core/backends/cpu/_kernels.*.so")
    command = [FREE_THREADED, "-I", str(HERE / "kernels_alone.py"), str(kernels)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("without the interpreter's lock\n")


@pytest.mark.parametrize("minor", MINORS, ids=lambda minor: f"3.{minor}")
def test_its_kernels_serve_every_python(unpacked, minor):
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on this machine")
    command = [python, "-I", str(HERE / "kernels_alone.py"), str(unpacked / "bnb_core/backends/cpu/_kernels.abi3.so")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": ""})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"(3, {minor})")


def test_it_uses_nothing_but_pythons_stable_interface(released):
    report = subprocess.run(
        [sys.executable, "-m", "abi3audit", "--strict", "--report", str(released)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert report.returncode == 0, report.stderr
    (specs,) = json.loads(report.stdout)["specs"].values()
    scanned = {each["name"]: each["result"] for each in specs["wheel"]}
    assert set(scanned) == {"_signature.abi3.so", "_kernels.abi3.so"}
    assert all(each["is_abi3"] and each["baseline"] == "3.10" for each in scanned.values()), scanned


def test_its_name_says_which_pythons_and_linuxes_it_is_for(released):
    assert re.search(r"-cp310-abi3-manylinux_2_\d+_x86_64\.whl$", released.name)
    assert oldest_glibc(released) <= TORCHS_GLIBC


def test_it_serves_where_no_compiler_is(released, tmp_path):
    """A fresh environment, this package from the wheel, a PATH of nothing: what a user has after pip install."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), "torch"]
    subprocess.run([*install, f"{released}[conformance]"], check=True, timeout=900)

    def said(*arguments: str) -> str:
        command = [str(environment / "bin" / "bnb-core"), *arguments]
        variables = {**os.environ, "PATH": "", "COLUMNS": "200"}
        return subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=900
        ).stdout

    assert "cpu" in said("info")
    assert " 0 failed, 0 failed as expected, 0 skipped" in said("conformance", "--backend", "cpu", "--cover", "pairs")


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    return build(folder, CXX=CROSS_COMPILER, _PYTHON_HOST_PLATFORM="linux-aarch64").wheel


@needs(CROSS_COMPILER, remedy="apt install g++-aarch64-linux-gnu")
def test_the_wheel_for_aarch64_holds_to_the_same(aarch64, tmp_path):
    wheel = repaired(aarch64, tmp_path)
    assert re.search(r"-cp310-abi3-manylinux_2_\d+_aarch64\.whl$", wheel.name)
    assert oldest_glibc(wheel) <= TORCHS_GLIBC
    subprocess.run([sys.executable, "-m", "abi3audit", "--strict", str(wheel)], check=True, timeout=300)
