"""compat/run_peer_tests.sh runs the tests of a checkout under the other name and counts their outcomes by file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "compat" / "run_peer_tests.sh"

MODULES = """
import bitsandbytes, bnb_core, pytest
def test_the_name_is_given():
    assert bitsandbytes.nn.Linear4bit is bnb_core.nn.Linear4bit
def test_embedding_not_implemented_error():
    assert False
@pytest.mark.slow
def test_slow():
    assert False
"""
OTHER = """
import pytest
def test_it_fails():
    assert False
def test_it_is_skipped():
    pytest.skip("here")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "bitsandbytes").mkdir()
    (folder / "bitsandbytes" / "__init__.py").write_text("raise ImportError('the package beside the tests')")
    (folder / "tests").mkdir()
    files = {"conftest": "", "test_modules": MODULES, "test_other": OTHER}
    for name, text in {**files, "test_broken": "1 / 0", "test_cuda_setup_evaluator": "1 / 0"}.items():
        (folder / "tests" / f"{name}.py").write_text(text)
    return folder


def counts(output: str) -> dict[str, list[int]]:
    rows = (line.split() for line in output.splitlines())
    return {row[0]: [int(n) for n in row[1:]] for row in rows if len(row) == 6 and all(n.isdecimal() for n in row[1:])}


def test_outcomes_are_counted_by_file_and_any_failure_fails_the_run(checkout):
    result = run(str(checkout))
    assert result.returncode == 1, result.stderr
    # passed, failed, on purpose, skipped, not collected
    assert counts(result.stdout) == {
        "tests/test_broken.py": [0, 0, 0, 0, 1],
        "tests/test_modules.py": [1, 0, 1, 0, 0],
        "tests/test_other.py": [0, 1, 0, 1, 0],
        "all": [1, 1, 1, 1, 1],
    }


def test_arguments_go_to_pytest(checkout):
    result = run(str(checkout), "tests/test_modules.py", "-k", "name")
    assert result.returncode == 0, result.stdout
    assert counts(result.stdout)["all"] == [1, 0, 0, 0, 0]


def test_another_folder_is_refused(tmp_path):
    result = run(str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"FOLDER: expected a checkout of bitsandbytes' repository, got {tmp_path}\n"
