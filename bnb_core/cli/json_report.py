"""The option `--json` of the commands that write a report in the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from .errors import BadInput
from .paths import PathOption


def _refused(path: Path, error: OSError) -> BadInput:
    return BadInput(f"--json: cannot write to {path}: {error.strerror}")


def _check_writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Try the file before any work starts, so that none is lost; leave what is there as it is."""
    if path is not None:
        try:
            exists = os.path.lexists(path)
            path.open("a").close()
            if not exists:
                path.unlink()
        except OSError as error:
            raise _refused(path, error) from None
    return path


json_option = click.option(
    "--json", "json_path", type=PathOption(), callback=_check_writable, help="Write a report here."
)


def write_json(path: Path | None, content: Any) -> None:
    """Write the report, if one was asked for."""
    if path is not None:
        try:
            path.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise _refused(path, error) from None
