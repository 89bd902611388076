"""``bitsandbytes.utils``: all of :mod:`bnb_core.utils`, and what only callers of bitsandbytes look for there."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any

from torch import nn

from bnb_core.utils import *  # noqa: F403
from bnb_core.utils import OutlierTracer
from bnb_core.utils import __all__ as _names

__all__ = [*_names, "execute_and_return", "outlier_hook"]


def execute_and_return(command_string: str) -> tuple[str, str]:
    """What a command, which no shell sees, writes to its standard output and to its standard error, stripped."""
    result = subprocess.run(shlex.split(command_string), capture_output=True, text=True)
    return result.stdout.strip(), result.stderr.strip()


def outlier_hook(module: nn.Module, input: tuple[Any, ...]) -> None:
    """The hook by which :class:`OutlierTracer` watches a layer, before its forward."""
    OutlierTracer.get_instance().trace(module, input)
