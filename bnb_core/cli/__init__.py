"""The console script `bnb-core`; `python -m bnb_core` is the same program."""

from __future__ import annotations

import importlib.util
import sys

REQUIRED = ("click", "rich", "matplotlib")


def main() -> None:
    """Run the program, or say what to install where the packages of the `cli` extra are missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'bnb-core needs {", ".join(missing)}: pip install "bnb_core[cli]"', file=sys.stderr)
        sys.exit(2)
    from .commands import bnb_core

    bnb_core(prog_name="bnb-core")
