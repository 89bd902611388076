"""The face that callers of ``bitsandbytes`` see."""

from __future__ import annotations

import sys
from importlib import import_module

NAME = "bitsandbytes"
_MODULES = ("autograd", "functional", "nn", "nn.parametrize", "optim", "utils")


def install_as_bitsandbytes() -> None:
    """Make ``import bitsandbytes`` in this process give bnb_core.

    Raises:
        RuntimeError: another bitsandbytes is imported already.
    """
    import bnb_core

    present = sys.modules.get(NAME)
    if present is not None and present is not bnb_core:
        raise RuntimeError(
            f"{NAME} is already imported from {getattr(present, '__file__', 'an unknown place')}; "
            "call install_as_bitsandbytes() before anything imports it"
        )
    sys.modules[NAME] = bnb_core
    for name in _MODULES:
        sys.modules[f"{NAME}.{name}"] = import_module(f"bnb_core.{name}")
