"""Says so when a kernel's first call takes long: Triton compiles it then, once for a GPU, and keeps it on disk."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Timer

from triton import knobs

PATIENCE = 2.0
"""Seconds that a compilation may take in silence."""

_called: set[Hashable] = set()


@contextmanager
def told_when_long(name: str, variant: Hashable) -> Iterator[None]:
    """Around a launch: the first one of a variant of this kernel logs a line once it has taken PATIENCE."""
    key = (name, variant)
    if key in _called:
        yield
        return
    timer = Timer(PATIENCE, _tell, [name])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    _called.add(key)


def _tell(name: str) -> None:
    logging.getLogger("bnb_core").warning(
        "Triton compiles %s for this GPU, once; it is kept in %s", name, knobs.cache.dir
    )
