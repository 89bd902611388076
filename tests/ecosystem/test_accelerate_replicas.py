"""Accelerate's data parallelism: two processes give the losses of one. Its FSDP refuses CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("replicas.py")


def _run(processes: int, folder: Path) -> dict:
    path = folder / f"{processes}.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run([*launch, str(SCRIPT), str(path)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


def test_two_processes_train_as_one(tmp_path: Path):
    one, two = _run(1, tmp_path), _run(2, tmp_path)
    assert two["type"] == "MULTI_CPU"
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    assert one["losses"][-1] < one["losses"][0]
