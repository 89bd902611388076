"""`bnb-core dequantize`: a quantized folder becomes one of plain values."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from bnb_core.checkpoints.dequantizing import dequantize_checkpoint
from bnb_core.quant_state import DTYPES

from .conversion import device_option, in_argument, out_argument, progress_bar, refusals_in_one_line, tell
from .json_report import json_option, write_json


@click.command()
@in_argument
@out_argument
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Of the weights; default: what they had before they were quantized.",
)
@device_option
@json_option
def command(path: Path, out: Path, dtype: str | None, device: str, json_path: Path | None) -> None:
    """Dequantize the checkpoint in the folder IN, made by quantize or by bitsandbytes, into the new folder OUT."""
    began = time.perf_counter()
    with refusals_in_one_line(out), progress_bar("dequantizing") as progress:
        chosen = None if dtype is None else DTYPES[dtype]
        result = dequantize_checkpoint(path, out, chosen, torch.device(device), progress)
    seconds = time.perf_counter() - began
    tell(result, out, seconds, "dequantized")
    write_json(json_path, {**result._asdict(), "seconds": seconds, "out": str(out)})
