"""Code in an interpreter of its own, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PACKAGES = Path(__file__).parent / "packages"
QUANTIZE = "import torch, bnb_core; bnb_core.functional.quantize_4bit(torch.ones(64)); print('served')"


def run_python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """With the packages of a folder, if one is given."""
    variables = {**os.environ, **environment}
    if folder is not None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=PACKAGES, timeout=120
    )
