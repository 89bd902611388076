"""How a command refuses bad input: one line, exit code 2."""

from __future__ import annotations

import click


class BadInput(click.ClickException):
    """The person's input cannot be used; click prints the message as one line."""

    exit_code = 2
