"""The command: checks what was asked for before any work starts, then runs the demo in order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from bnb_core import registry
from bnb_core.checks import check_device
from bnb_core.paged import paged_tensor

from ..errors import BadInput
from ..paths import PathOption
from . import data
from .pipeline import run
from .qlora import chosen_backend
from .settings import Settings


@click.command()
@click.option("--device", default=Settings.device, show_default=True, help="Torch device to run on.")
@click.option("--backend", help="Backend that must serve everything [default: the best for the device].")
@click.option("--steps", type=click.IntRange(1, 10**9), default=Settings.steps, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=Settings.seed, show_default=True)
@click.option("--out", type=PathOption(), default="bnb-core-demo", show_default=True)
@click.option("--data", "folder", type=PathOption(), help="Folder of your own text files.")
def command(device: str, backend: str | None, steps: int, seed: int, out: Path, folder: Path | None) -> None:
    """Train a small language model on text, quantize it, compare, and fine-tune it with QLoRA."""
    settings = Settings(steps=steps, seed=seed, device=device, backend=backend)
    check_device_and_backend(settings)
    text, documentation = data.source_code(folder), data.documentation()
    check_writable(out)
    with chosen_backend(settings):
        run(settings, text, documentation, out)


def check_device_and_backend(settings: Settings) -> None:
    try:
        device = check_device("--device", settings.device)
        with chosen_backend(settings):
            registry.served_by("quantize_4bit", device.type)
            paged_tensor((1,), torch.uint8, device)
    except OSError as error:
        raise BadInput(str(error.strerror)) from None
    except ValueError as error:
        raise BadInput(str(error)) from None


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"--out: cannot write to {folder}: {error.strerror}") from None
