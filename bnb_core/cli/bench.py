"""`bnb-core bench`: how fast this installation is, beside the device's own copy and dense matmul."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bnb_core import registry
from bnb_core.conformance import runner
from bnb_core.conformance.perf import measure

from .errors import BadInput


@click.command()
@click.option("--backend", "backend_name", help="The backend to time; default: the one that serves gemm_4bit there.")
@click.option("--device", default=None, help="torch device; default: the backend's first, or cpu.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here.")
def command(backend_name: str | None, device: str | None, json_path: Path | None) -> None:
    """Time each primitive: medians of rounds in which all take turns."""
    try:
        device_type = (device or "cpu").partition(":")[0]
        backend = runner.backend_of(backend_name or registry.serving(device_type)["gemm_4bit"])
        chosen_device = runner.device_of(backend, device)
    except (ValueError, RuntimeError) as error:
        raise BadInput(str(error)) from None
    rows = measure(backend, chosen_device)
    show_perf(Console(), rows)
    if json_path is not None:
        report = {"backend": backend.name, "device": str(chosen_device), "details": backend.details(), "rows": rows}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


def show_perf(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table("primitive", "case", "time", "GB/s", "of copy", "GFLOP/s", "of dense matmul")
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    console.print(table)
