"""How a command refuses bad input: one line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from bnb_core.backend import BackendError

_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What newer versions of click raise for a group without a command, to show its help."""


class BadInput(click.ClickException):
    """The person's input cannot be used; click prints the message as one line."""

    exit_code = 2


@contextmanager
def in_one_line() -> Iterator[None]:
    """Errors of usage, which click would print in four lines, and of the choice of a backend."""
    try:
        yield
    except _NO_ARGUMENTS:
        raise
    except click.UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        help_ = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        raise BadInput(message + help_) from None
    except BackendError as error:
        raise BadInput(str(error)) from None
