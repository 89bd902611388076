"""Packages that register kernels for the operators of bitsandbytes on devices of their own."""

from __future__ import annotations

import warnings

from bnb_core.backend import in_words
from bnb_core.installed_backends import installed_entry_points

ENTRY_POINT_GROUP = "bitsandbytes.backends"


def load() -> None:
    """Have every installed package of the group register its kernels: its entry point is a function of no arguments.

    Warns:
        UserWarning: one fails; the others go on.
    """
    for entry in installed_entry_points(ENTRY_POINT_GROUP)[0]:
        try:
            entry.load()()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            warnings.warn(
                f"{entry.name!r} of {package} ({entry.value}) has registered no kernels: {in_words(error)}",
                stacklevel=2,
            )


def offered() -> bool:
    """Whether there is such a package."""
    return bool(installed_entry_points(ENTRY_POINT_GROUP)[0])
