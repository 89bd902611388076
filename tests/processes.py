"""What tests have another process do, which imports it by name."""

from __future__ import annotations

import errno
import os
import time


def double(number, on_step):
    """Reports a step, and prints where no result must go."""
    print("printed")
    on_step(1.5)
    return 2 * number


def refuse(on_step):
    raise OSError(errno.ENOSPC, "no room for state")


def end(on_step):
    os._exit(3)


def sleep(on_step):
    """Long, once it has reported its process."""
    on_step(os.getpid())
    time.sleep(60)
