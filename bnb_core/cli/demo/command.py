"""The command: checks what was asked for before any work starts, then runs the demo in order."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from bnb_core import registry

from ..errors import BadInput
from . import data
from .pipeline import run
from .qlora import chosen_backend
from .settings import Settings


@click.command()
@click.option("--device", default=Settings.device, show_default=True, help="Torch device to run on.")
@click.option("--backend", help="Backend that must serve everything [default: the best for the device].")
@click.option("--steps", type=click.IntRange(min=1), default=Settings.steps, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=Settings.seed, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="bnb-core-demo", show_default=True)
@click.option("--data", "folder", type=click.Path(path_type=Path), help="Folder of your own text files.")
def command(device: str, backend: str | None, steps: int, seed: int, out: Path, folder: Path | None) -> None:
    """Train a small language model on text, quantize it, compare, and fine-tune it with QLoRA."""
    settings = Settings(steps=steps, seed=seed, device=device, backend=backend)
    check_device(device)
    check_backend(settings)
    text, documentation = data.source_code(folder), data.documentation()
    check_writable(out)
    with chosen_backend(settings):
        run(settings, text, documentation, out)


def check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"--device: {device!r} cannot be used: {first_line(error)}") from None


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"--out: cannot write to {folder}: {error.strerror}") from None


def check_backend(settings: Settings) -> None:
    try:
        with chosen_backend(settings):
            serving = registry.serving(torch.device(settings.device).type)["quantize_4bit"]
    except registry.BackendError as error:
        raise BadInput(f"--backend: {first_line(error)}") from None
    if serving not in registry.backends():
        raise BadInput(f"--backend: {serving}")


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
