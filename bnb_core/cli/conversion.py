"""What the commands that read or write checkpoints share: arguments, a progress bar, how they end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import (
    Progress as Bar,
)

from bnb_core.checkpoints.convert import Progress
from bnb_core.checkpoints.headers import CheckpointFileError
from bnb_core.checkpoints.quantizing import Result

from .errors import BadInput
from .paths import PathOption

in_argument = click.argument("path", metavar="IN", type=PathOption())
out_argument = click.argument("out", metavar="OUT", type=PathOption())
device_option = click.option("--device", default="cpu", show_default=True, help="The torch device that computes.")


@contextmanager
def refusals_in_one_line(out: Path | None = None) -> Iterator[None]:
    """Bad input, and what the system refuses, with how to go on."""
    try:
        yield
    except (CheckpointFileError, ValueError, TypeError) as error:
        raise BadInput(" ".join(str(error).split())) from None
    except OSError as error:
        reason = error.strerror or str(error)
        where = f"{error.filename}: " if error.filename else ""
        left = out is not None and out.with_name(f"{out.name}.partial").exists()
        advice = "; nothing is lost: the same command goes on where it was" if left else ""
        raise BadInput(f"{where}{reason}{advice}") from None


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal, with bytes, bytes/s and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield Progress(
            total=lambda nbytes: bar.update(task, total=nbytes),
            advance=lambda nbytes: bar.advance(task, nbytes),
            resumed=lambda nbytes: bar.update(task, completed=nbytes),
        )


def tell(result: Result, out: Path, seconds: float, verb: str) -> None:
    """What was done, in a few lines."""
    for remark in result.remarks:
        click.echo(remark)
    kept = ", ".join(f"{count} {reason}" for reason, count in result.kept.items())
    click.echo(
        f"{out}: {result.quantized} weights {verb}, {size(result.bytes_before)} to {size(result.bytes_after)} "
        f"({result.bytes_after / result.bytes_before:.3f}) in {seconds:.1f} s"
    )
    if kept:
        click.echo(f"kept as they are: {kept}")


def size(nbytes: float) -> str:
    """In the largest binary unit that fits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.2f} {unit}"
