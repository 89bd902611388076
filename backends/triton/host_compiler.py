"""Whether Triton finds the C compiler that it builds its launcher with, on machines that may have none."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version

WITHOUT_COMPILER = Version("3.8")
"""The first Triton that launches on NVIDIA's GPUs by what its wheel brings; for other makers' it still builds one."""

DISTRIBUTIONS = ("triton", "pytorch-triton")


def why_no_host_compiler() -> str | None:
    """What is missing, in words; None where nothing is, or where Triton needs none."""
    found = _triton_version()
    if torch.version.cuda is not None and found is not None and found >= WITHOUT_COMPILER:
        return None
    needs = f"Triton {found or 'of this version'} builds its launcher with a C compiler and Python's headers"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = "finds no compiler"
    elif not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing = "finds no Python.h"
    else:
        return None
    remedy = "on Debian and Ubuntu: apt install gcc python3-dev"
    newer = f"; Triton {WITHOUT_COMPILER} and newer, of a newer torch, needs neither" if torch.version.cuda else ""
    return f"{needs}, and {missing}; {remedy}{newer}"


def _triton_version() -> Version | None:
    for name in DISTRIBUTIONS:
        try:
            return Version(version(name))
        except PackageNotFoundError:
            continue
    return None
