"""`bnb-core bench`: how fast this installation is, beside the device's own copy and dense matmul."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bnb_core import registry
from bnb_core.backend import Backend, BackendError, in_words
from bnb_core.conformance import perf, report, runner

from .errors import BadInput
from .info import GPU_KINDS
from .json_report import json_option, write_json

BYTES_PER_ENTRY = 24
"""What the copies of a weight and the optimizer's state take at once, for each of its entries."""


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
        if backend_name is None:
            backend_name = registry.served_by("gemm_4bit", (device or "cpu").partition(":")[0])
        backend = registry.available_backend(backend_name)
        chosen_device = runner.device_of(backend, device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    write_json(json_path, time_primitives(Console(), backend, chosen_device, size))


def time_primitives(console: Console, backend: Backend, device: torch.device, size: int = perf.SIZE) -> dict[str, Any]:
    """Print a table of times, and give the same as a report."""
    check_size(size, device)
    try:
        rows = perf.measure(backend, device, size)
    except BackendError:
        raise
    except Exception as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise click.ClickException(f"backend {backend.name!r}: {in_words(error)}{notes}") from error
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    return {**report.header(backend, device), "size": size, "rows": rows}


def check_size(size: int, device: torch.device) -> None:
    """Refuse a weight that the device cannot hold: the system may take hours, or other processes, to find out."""
    memory, needed = memory_of(device), BYTES_PER_ENTRY * size**2
    if memory is not None and needed > memory:
        raise BadInput(
            f"--size: expected at most {math.isqrt(memory // BYTES_PER_ENTRY)} on {device}, which has "
            f"{memory / 2**30:.1f} GiB of memory, got {size}, which takes {needed / 2**30:.1f} GiB"
        )


def memory_of(device: torch.device) -> int | None:
    """Its bytes of memory in all, or the host's for a device that has none of its own; None where nothing tells."""
    if device.type in GPU_KINDS:
        return getattr(torch, device.type).get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
