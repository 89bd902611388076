"""The group of sub-commands. Each is a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from .errors import in_one_line

COMMANDS = {
    "info": ".info",
    "quantize": ".quantize",
    "dequantize": ".dequantize",
    "inspect": ".inspect",
    "chat": ".chat",
    "demo": ".demo.command",
    "conformance": ".conformance",
    "bench": ".bench",
    "plan": ".plan",
}
"""Sub-command name to the module, relative to this package, that has a click command `command`."""

INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a sub-command only when it is asked for, and refuses bad usage in one line."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[name], __package__).command

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        try:
            with in_one_line():
                return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            context.exit(INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bnb_core")
def bnb_core() -> None:
    """Quantization for PyTorch: look at this machine, quantize a checkpoint, try a model."""
