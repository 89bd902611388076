"""What the demo found, as a table on the screen and a folder of files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from .fresh_process import MIB
from .qlora import FineTuning
from .settings import Settings


@dataclass(frozen=True)
class Quantized:
    """One row of the comparison: a model quantized in one way, or not at all."""

    method: str
    perplexity: float
    weight_bytes: int
    share_of_bf16: float
    tokens_per_second: float
    text: str


@dataclass(frozen=True)
class Results:
    """Everything the demo measured."""

    settings: Settings
    environment: dict[str, str]
    train_losses: list[float]
    quantized: list[Quantized]
    fine_tunings: dict[str, FineTuning]
    checkpoint: str
    checkpoint_has_same_logits: bool
    seconds: float
    cpu_seconds: float


Rows = tuple[list[str], list[list[str]]]
"""Column names, and the cells of each row."""


def comparison(rows: list[Quantized]) -> Rows:
    """The quantized models against the first row, which is the float one."""
    columns = ["weights", "perplexity", "change", "bytes", "of bf16", "tokens/s"]
    reference = rows[0].perplexity
    cells = [
        [
            row.method,
            f"{row.perplexity:.4f}",
            change(row.perplexity, reference),
            f"{row.weight_bytes:,}",
            f"{row.share_of_bf16:.3f}",
            f"{row.tokens_per_second:.0f}",
        ]
        for row in rows
    ]
    return columns, cells


def fine_tuning_comparison(runs: dict[str, FineTuning]) -> Rows:
    """One column a run, each beside what the first one needed."""
    first = next(iter(runs.values()))
    cells = [
        ["final loss", *(f"{final_loss(run.losses):.4f}" for run in runs.values())],
        [
            "  against the first run",
            *(change(final_loss(r.losses), final_loss(first.losses)) for r in runs.values()),
        ],
        ["perplexity before", *(f"{run.perplexity_before:.4f}" for run in runs.values())],
        ["perplexity after", *(f"{run.perplexity_after:.4f}" for run in runs.values())],
        ["bytes of the frozen layers", *(f"{run.base_bytes:,}" for run in runs.values())],
        ["bytes of optimizer state", *(f"{run.optimizer_state_bytes:,}" for run in runs.values())],
        [
            "  share of the first run's",
            *(f"{r.optimizer_state_bytes / first.optimizer_state_bytes:.3f}" for r in runs.values()),
        ],
        ["adapters with 32-bit state", *(str(run.adapters_with_32bit_state) for run in runs.values())],
        ["adapters with paged state", *(str(run.adapters_with_paged_state) for run in runs.values())],
        ["peak memory", *(mebibytes(run.peak_memory) for run in runs.values())],
        ["  above the start", *(mebibytes(own_memory(run)) for run in runs.values())],
    ]
    return ["", *runs], cells


def change(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.2%}"


def final_loss(losses: list[float]) -> float:
    """Mean of the last tenth: single batches differ too much to compare."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def own_memory(run: FineTuning) -> int | None:
    """Peak memory less what the process held before the model was loaded."""
    if run.peak_memory is None or run.memory_at_start is None:
        return None
    return run.peak_memory - run.memory_at_start


def mebibytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / MIB:.1f} MiB"


def screen_table(title: str, rows: Rows) -> Table:
    """Numbers right-aligned, the first column as it is."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if index else "left")
    for cells in rows[1]:
        table.add_row(*cells)
    return table


def markdown_table(rows: Rows) -> str:
    columns, cells = rows
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *cells])


def write(folder: Path, results: Results) -> None:
    """Write metrics.json, the plots and report.md."""
    (folder / "metrics.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    plot_losses(folder / "training-loss.png", {"f32": results.train_losses}, "training")
    runs = results.fine_tunings
    plot_losses(folder / "fine-tuning-loss.png", {n: run.losses for n, run in runs.items()}, "fine-tuning")
    plot_perplexity(folder / "perplexity.png", results.quantized)
    (folder / "report.md").write_text(report(results))


def report(results: Results) -> str:
    """The report as Markdown."""
    environment = "\n".join(f"- {name}: {text}" for name, text in results.environment.items())
    texts = "\n\n".join(f"### {row.method}\n```\n{row.text}\n```" for row in results.quantized)
    runs = results.fine_tunings
    identical = "bit-identical" if results.checkpoint_has_same_logits else "DIFFERENT"
    return f"""# bnb-core demo

{environment}
- {results.seconds:.0f} s, {results.cpu_seconds:.0f} s of CPU time, {results.settings.steps} training steps

## Quantization
{markdown_table(comparison(results.quantized))}

Perplexity is per byte of held-out text. Bytes are those of the linear layers' weights as they stand in
memory, scales and code tables included; "of bf16" compares with the same weights in bfloat16. Tokens/s is
for decoding one sequence with a key-value cache.

![training loss](training-loss.png)
![perplexity](perplexity.png)

`{results.checkpoint}`, loaded into a fresh model, gives {identical} logits.

## Fine-tuning with low-rank adapters
{markdown_table(fine_tuning_comparison(runs))}

Final loss is the mean over the last tenth of the steps; both runs see the same batches and start from the
same adapters. Optimizer state counts all its tensors, scales and code tables included. Peak memory is that of
a fresh process for each run, "above the start" without what the process held before it loaded the model.

![fine-tuning loss](fine-tuning-loss.png)

## The same prompt with each
Prompt: `{results.settings.prompt!r}`

{texts}
"""


def plot_losses(path: Path, curves: dict[str, list[float]], title: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), cycle(("-", "--"))):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name, linewidth=1)
    axes.set(title=f"Loss, {title}", xlabel="step", ylabel="nats per byte")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_perplexity(path: Path, rows: list[Quantized]) -> None:
    """Each quantized model's change against the float one: the perplexities themselves look alike."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    reference, *others = rows
    changes = [100 * (row.perplexity / reference.perplexity - 1) for row in others]
    bars = axes.bar([row.method for row in others], changes)
    axes.bar_label(bars, [f"{row.perplexity:.3f}" for row in others], padding=3)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set(title=f"Held-out perplexity ({reference.perplexity:.3f} in f32)", ylabel="change in percent")
    figure.savefig(path, dpi=120)
