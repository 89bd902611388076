"""Packages that register kernels for the operators of bitsandbytes on devices of their own."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

ENTRY_POINT_GROUP = "bitsandbytes.backends"


def load() -> None:
    """Have every installed package of the group register its kernels: its entry point is a function of no arguments.

    Warns:
        UserWarning: one fails; the others go on.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()()
        except (Exception, SystemExit) as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            warnings.warn(
                f"{entry.name!r} of {package} ({entry.value}) has registered no kernels: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def offered() -> bool:
    """Whether there is such a package."""
    return bool(entry_points(group=ENTRY_POINT_GROUP))
