"""The demo from beginning to end: train, quantize and compare, fine-tune, report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn

import bnb_core
from bnb_core import registry

from ..info import cpu_model
from . import checkpoint, data, qlora, quantized, report, training
from .fresh_process import in_fresh_process
from .model import Transformer
from .settings import Settings

console = Console()


def run(settings: Settings, text: data.Corpus, documentation: data.Corpus, folder: Path) -> report.Results:
    """The whole demo. Prints as it goes, writes the report folder and returns what it measured."""
    start, cpu_start = time.perf_counter(), os.times()
    console.print(f"{text.name}: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out", markup=False)
    model, losses = train_model(settings, text)
    paths = {method: folder / name for method, name in checkpoint.FILES.items()}
    checkpoint.save_model(model, paths[quantized.FLOAT])

    rows, same_logits = compare(model, text, settings, paths[quantized.QLORA_BASE])
    console.print(report.screen_table("Quantized copies", report.comparison(rows)))
    for row in rows:
        console.print(Panel(Text(settings.prompt + row.text), title=row.method, title_align="left"))

    console.print(f"{documentation.name}: {len(documentation.train):,} bytes to fine-tune on")
    runs = {recipe.name: fine_tune(recipe, paths, documentation, settings) for recipe in qlora.RECIPES}
    console.print(report.screen_table("Low-rank adapters", report.fine_tuning_comparison(runs)))

    results = report.Results(
        settings=settings,
        environment=environment(settings),
        train_losses=losses,
        quantized=rows,
        fine_tunings=runs,
        checkpoint=paths[quantized.QLORA_BASE].name,
        checkpoint_has_same_logits=same_logits,
        seconds=time.perf_counter() - start,
        cpu_seconds=sum(os.times()[:4]) - sum(cpu_start[:4]),
    )
    report.write(folder, results)
    console.print(f"report: {folder / 'report.md'} ({results.seconds:.0f} s)", markup=False)
    return results


def train_model(settings: Settings, text: data.Corpus) -> tuple[nn.Module, list[float]]:
    """The float model, and its loss at every step."""
    torch.manual_seed(settings.seed)
    model = Transformer(settings).to(settings.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    with progress("training in f32", settings.steps) as on_step:
        return model, training.train(model, optimizer, text.train, settings.steps, settings, on_step)


def compare(model: nn.Module, text: data.Corpus, settings: Settings, path: Path) -> tuple[list[report.Quantized], bool]:
    """One row a method. The model that QLoRA starts from is saved, loaded again and compared."""
    bf16_bytes = quantized.bf16_weight_bytes(model)
    same_logits = False
    rows = []
    with progress("quantizing and comparing", 1 + len(quantized.METHODS)) as on_step:
        for method in (quantized.FLOAT, *quantized.METHODS):
            copy = model if method == quantized.FLOAT else quantized.quantize(model, method, settings)
            row = measure(copy, method, bf16_bytes, text, settings)
            rows.append(row)
            if method == quantized.QLORA_BASE:
                checkpoint.save_model(copy, path)
                loaded = checkpoint.load(path, method, settings)
                same_logits = checkpoint.same_logits(copy, loaded, text.held_out, settings)
            on_step(row.perplexity)
    if not same_logits:
        raise click.ClickException(
            f"{path}, loaded again, gives other logits than the model that was saved; "
            "bnb-core conformance tells which primitive is wrong"
        )
    return rows, same_logits


def measure(model: nn.Module, method: str, bf16_bytes: int, text: data.Corpus, settings: Settings) -> report.Quantized:
    """Perplexity, size, speed and a sample of one model."""
    size = quantized.weight_bytes(model)
    perplexity = training.perplexity(model, text.held_out, settings)
    generation = training.generate(model, settings)
    return report.Quantized(method, perplexity, size, size / bf16_bytes, generation.tokens_per_second, generation.text)


def fine_tune(recipe: qlora.Recipe, paths: dict[str, Path], text: data.Corpus, settings: Settings) -> qlora.FineTuning:
    """One LoRA run in a process of its own, with a progress bar here."""
    with progress(recipe.name, settings.fine_tuning_steps) as on_step:
        arguments = (recipe, paths[recipe.base], text, settings)
        return in_fresh_process(qlora.fine_tune, *arguments, on_step=on_step)


def environment(settings: Settings) -> dict[str, str]:
    """Where the figures come from."""
    served_by = registry.serving(torch.device(settings.device).type)
    return {
        "bnb_core": bnb_core.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": cpu_model(),
        "threads": str(torch.get_num_threads()),
        "device": settings.device,
        "backends": ", ".join(sorted(set(served_by.values()))),
        "seed": str(settings.seed),
    }


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[float], None]]:
    """A progress bar; call what it yields after every step with the value to show."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[value]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, value="")
        yield lambda value: bar.update(task, advance=1, value=f"{value:.3f}")
