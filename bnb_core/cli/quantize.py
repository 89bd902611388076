"""`bnb-core quantize`: a folder of safetensors files becomes a quantized one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bnb_core.checkpoints.quantizing import quantize_checkpoint
from bnb_core.checkpoints.verifying import Errors, report, verify_checkpoint
from bnb_core.checks import BLOCKSIZES, QUANT_STORAGES
from bnb_core.quantize import METHODS, QuantizationConfig

from .conversion import device_option, in_argument, out_argument, progress_bar, refusals_in_one_line, tell
from .json_report import json_option, write_json
from .paths import PathOption

WORST = 10
STORAGES = {str(dtype).removeprefix("torch."): dtype for dtype in QUANT_STORAGES}


@click.command()
@in_argument
@out_argument
@click.option("--format", "method", type=click.Choice(METHODS), default="nf4", show_default=True)
@click.option("--blocksize", type=click.Choice([str(each) for each in BLOCKSIZES]), default="64", show_default=True)
@click.option(
    "--double-quant/--no-double-quant",
    default=True,
    show_default=True,
    help="Quantize the scales of 4-bit blocks, too.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Names that stay as they are, beside embeddings, heads, norms and routers; may be given again.",
)
@click.option(
    "--storage", type=click.Choice(list(STORAGES)), default="uint8", show_default=True,
    help="The dtype that 4-bit codes are viewed as; for FSDP that of the other parameters.",
)  # fmt: skip
@click.option(
    "--separate-experts",
    is_flag=True,
    help="Leave experts that are one tensor each separate, for Transformers 4; else a layer's become one tensor.",
)
@device_option
@click.option("--verify", is_flag=True, help="Read the result again and show the error of each weight.")
@click.option("--picture", type=PathOption(), help="With --verify: draw the errors into this file (.png, .svg, .pdf).")
@json_option
def command(
    path: Path,
    out: Path,
    method: str,
    blocksize: str,
    double_quant: bool,
    skip: tuple[str, ...],
    storage: str,
    separate_experts: bool,
    device: str,
    verify: bool,
    picture: Path | None,
    json_path: Path | None,
) -> None:
    """Quantize the checkpoint in the folder IN into the new folder OUT.

    IN holds safetensors files, one or many, and perhaps a config.json, as Transformers saves a model; Transformers
    loads OUT. Memory is bounded by the largest tensor. Killed, the same command goes on where it was.
    """
    config = QuantizationConfig(
        method, double_quant, int(blocksize), quant_storage=STORAGES[storage], skip_modules=("lm_head", *skip)
    )
    began = time.perf_counter()
    with refusals_in_one_line(out):
        _check_picture(picture, verify)
        with progress_bar("quantizing") as progress:
            result = quantize_checkpoint(
                path, out, config, torch.device(device), progress, fuse_experts=not separate_experts
            )
    seconds = time.perf_counter() - began
    tell(result, out, seconds, f"quantized to {method}")
    content: dict[str, Any] = {**result._asdict(), "seconds": seconds, "out": str(out), "method": method}
    if verify:
        with refusals_in_one_line(), progress_bar("verifying") as progress:
            errors = verify_checkpoint(out, path, progress)
        show_worst(Console(), errors)
        content["errors"] = report(errors)
        if picture is not None:
            draw(picture, errors)
            click.echo(f"{picture}: the errors of all weights")
    write_json(json_path, content)


def _check_picture(picture: Path | None, verify: bool) -> None:
    """Before any work: that it can be drawn there."""
    if picture is None:
        return
    if not verify:
        raise ValueError("--picture: shows what --verify finds; give both")
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--picture: expected a name that ends in .png, .svg or .pdf, got {picture}")
    if not picture.parent.is_dir():
        raise ValueError(f"--picture: no such folder: {picture.parent}")


def show_worst(console: Console, errors: list[Errors]) -> None:
    """The weights with the most noise, and the mean of all."""
    table = Table("weight", "format", title=f"The {WORST} weights with the lowest SQNR", title_justify="left")
    for column in ("largest error", "RMS error", "SQNR, dB"):
        table.add_column(column, justify="right")
    for each in errors[:WORST]:
        table.add_row(each.name, each.format, f"{each.largest:.3g}", f"{each.rms:.3g}", f"{each.sqnr:.2f}")
    console.print(table)
    middle = errors[len(errors) // 2]
    console.print(f"median of {len(errors)}: {middle.sqnr:.2f} dB; all other tensors are the same to the byte")


def draw(picture: Path, errors: list[Errors]) -> None:
    """SQNR of each weight by its size, and how many have which."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, width_ratios=(3, 1))
    for format_ in dict.fromkeys(each.format for each in errors):
        chosen = [each for each in errors if each.format == format_]
        left.scatter([each.numel for each in chosen], [each.sqnr for each in chosen], s=14, alpha=0.6, label=format_)
    left.set(xscale="log", xlabel="elements of the weight", ylabel="SQNR, dB", title="Each weight")
    left.legend()
    right.hist([each.sqnr for each in errors], bins=30, orientation="horizontal")
    right.set(xlabel="weights", title="How many")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
