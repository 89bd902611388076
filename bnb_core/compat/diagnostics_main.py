"""``bitsandbytes.diagnostics.main``, which ``python -m bitsandbytes`` runs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Print what ``bnb-core info`` does: versions, hardware, backends and what serves."""
    from bnb_core.cli import main as program

    sys.argv[1:] = ["info"]
    program()
