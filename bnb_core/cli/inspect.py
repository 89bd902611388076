"""`bnb-core inspect`: what a checkpoint holds and takes."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnb_core.checkpoints.sizes import Sizes, inspect_checkpoint

from .conversion import refusals_in_one_line, size
from .paths import PathOption


@click.command()
@click.argument("path", type=PathOption())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(path: Path, as_json: bool) -> None:
    """Show formats and sizes of the checkpoint PATH, a folder or a safetensors file, from its headers alone."""
    with refusals_in_one_line():
        sizes = inspect_checkpoint(path)
    if as_json:
        content = {**sizes._asdict(), "layers": [layer._asdict() for layer in sizes.layers]}
        click.echo(json.dumps(content, indent=2))
    else:
        show(Console(), sizes)


def show(console: Console, sizes: Sizes) -> None:
    """Three tables: formats, layers, what other formats would take."""
    console.print(
        f"{escape(sizes.path)}: {sizes.parameters:,} parameters, {size(sizes.nbytes)} in {sizes.files} file"
        f"{'' if sizes.files == 1 else 's'}, {8 * sizes.nbytes / max(sizes.parameters, 1):.2f} bits a parameter",
        highlight=False,
    )
    formats = Table("format", title="Formats", title_justify="left")
    formats.add_column("bytes", justify="right")
    for name, nbytes in sizes.formats.items():
        formats.add_row(name, size(nbytes))
    console.print(formats)

    layers = Table("layer", "formats", title="Layers", title_justify="left")
    for column in ("parameters", "bytes"):
        layers.add_column(column, justify="right")
    for layer in sizes.layers:
        layers.add_row(escape(layer.name), "; ".join(layer.formats), f"{layer.parameters:,}", size(layer.nbytes))
    console.print(layers)

    others = Table("linear layers in", title="What it would take", title_justify="left")
    for column in ("bytes", "of now"):
        others.add_column(column, justify="right")
    for name, nbytes in sizes.alternatives.items():
        others.add_row(name, size(nbytes), f"{nbytes / max(sizes.nbytes, 1):.3f}")
    console.print(others)
