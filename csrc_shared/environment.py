"""Environment variables that say what is built."""

from __future__ import annotations

import os


def listed(variable: str, separator: str, example: str) -> list[str]:
    """What the variable lists, each once; nothing where it is empty or not set."""
    text = os.environ.get(variable, "")
    names = [name.strip() for name in text.split(separator) if name.strip()]
    if text.strip() and not names:
        raise SystemExit(f"{variable}: expected names separated by {separator!r}, such as {example}, got {text!r}")
    return list(dict.fromkeys(names))
