"""The suite itself, on a device that is not a CPU and needs no hardware."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device in Python",
)
def test_the_suite_passes_on_a_device_of_its_own():
    program = Path(__file__).parent / "fake_device.py"
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, cwd=program.parent, timeout=300
    )
    lines = result.stdout.splitlines()
    assert lines and lines[-1].endswith("cases on fake, 0 failed"), result.stdout + result.stderr
    assert int(lines[-1].split()[0]) > 1000
