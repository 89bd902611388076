"""The console script `bnb-core`; `python -m bnb_core` is the same program."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import sys

REQUIRED = ("click", "rich", "matplotlib")


def main() -> None:
    """Run the program, or say what to install where the packages of the `cli` extra are missing.

    What the system refuses, such as output to a full disk, is one line and exit code 1.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'bnb-core needs {", ".join(missing)}: pip install "bnb_core[cli]"', file=sys.stderr)
        sys.exit(2)
    from .commands import bnb_core

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table has characters that not every terminal shows
    try:
        try:
            bnb_core(prog_name="bnb-core")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        _end_with(error)


def _end_with(error: OSError) -> None:
    """Say what the system refused, and end; the interpreter would try again to write what cannot be written."""
    with contextlib.suppress(OSError):
        if error.errno != errno.EPIPE:
            print(f"Error: {_explained(error)}", file=sys.stderr, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())
    sys.exit(1)


def _explained(error: OSError) -> str:
    """In a sentence: the system names the file that cannot be opened, but not the one that cannot be written."""
    reason = error.strerror or str(error)
    if error.filename:
        return f"{error.filename}: {reason}"
    bare = error.errno is not None and reason == os.strerror(error.errno)
    return f"cannot write the output: {reason}" if bare else reason
