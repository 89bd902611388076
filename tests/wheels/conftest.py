"""The distributions that the tests look at, each built once from this checkout."""

from __future__ import annotations

import subprocess
import sys

import pytest
from wheel_builds import ROOT, build, build_environment, repaired


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel for this machine, built from the checkout's files."""
    return build(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def released(built, tmp_path_factory):
    """The same as it is published: auditwheel has checked it and named its platform."""
    return repaired(built.wheel, tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, env=build_environment(), check=True, timeout=300, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tar.gz"))
