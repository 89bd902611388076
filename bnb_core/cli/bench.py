"""`bnb-core bench`: how fast this installation is, beside the device's own copy and dense matmul."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bnb_core import registry
from bnb_core.conformance import perf, report, runner
from bnb_core.registry import Backend, BackendError

from .errors import BadInput
from .json_report import json_option, write_json


@click.command()
@click.option("--backend", "backend_name", help="The backend to time; default: the one that serves gemm_4bit there.")
@click.option("--device", default=None, help="torch device; default: the backend's first, or cpu.")
@click.option(
    "--size", type=click.IntRange(min=64), default=perf.SIZE, show_default=True, help="Rows and columns of the weight."
)
@json_option
def command(backend_name: str | None, device: str | None, size: int, json_path: Path | None) -> None:
    """Time each primitive: medians of rounds in which all take turns."""
    try:
        name = backend_name or registry.served_by("gemm_4bit", (device or "cpu").partition(":")[0])
        backend = registry.available_backend(name)
        chosen_device = runner.device_of(backend, device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    write_json(json_path, time_primitives(Console(), backend, chosen_device, size))


def time_primitives(console: Console, backend: Backend, device: torch.device, size: int = perf.SIZE) -> dict[str, Any]:
    """Print a table of times, and give the same as a report."""
    try:
        rows = perf.measure(backend, device, size)
    except BackendError as error:
        raise BadInput(str(error)) from None
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    return {**report.header(backend, device), "size": size, "rows": rows}
