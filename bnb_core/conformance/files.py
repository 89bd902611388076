"""How the suite reads the files that people give it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as {what}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected {what}, a JSON object, got a {type(content).__name__}")
    return content
