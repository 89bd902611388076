"""The GPU backend beside its peers and the card's limits: `python benchmarks/gpu.py`; `gpu.sh` builds it first."""

from __future__ import annotations

import fnmatch
import gc
import json
from pathlib import Path

import click
import report
import torch
from cpu import OUTPUT, QUICK_ROUNDS, ROUNDS
from gpu_cases import DEVICE, all_cases
from measure import measure
from rich.console import Console
from rich.progress import track

from bnb_core import registry


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_path", type=OUTPUT, help="Write every round's times here.")
@click.option("--markdown", "markdown_path", type=OUTPUT, help="Write the table here.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True)
@click.option("--quick", is_flag=True, help=f"A selection of the cases, in {QUICK_ROUNDS} rounds.")
@click.option("--case", "pattern", default="*", help="Only the cases whose name matches this pattern.")
@click.option("--backend", default=None, help="The backend to time; default: the one that serves gemm_4bit there.")
def command(
    json_path: Path | None,
    markdown_path: Path | None,
    rounds: int,
    quick: bool,
    pattern: str,
    backend: str | None,
) -> None:
    """Time bnb_core on the current GPU beside bitsandbytes, torch and what the card can do."""
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no GPU")
    name = backend or registry.served_by("gemm_4bit", DEVICE)
    torch.manual_seed(0)
    chosen = [c for c in all_cases() if fnmatch.fnmatchcase(c.name, pattern) and (c.quick or not quick)]
    if not chosen:
        raise click.BadParameter(f"no case matches {pattern!r}", param_hint="--case")
    console = Console(width=200)
    results = []
    with registry.use_backend(name), torch.no_grad():
        for case in track(chosen, "measuring", console=console, transient=True):
            results.append(measure(case, QUICK_ROUNDS if quick else rounds, torch.device(DEVICE)))
            gc.collect()
            torch.cuda.empty_cache()
    facts = report.gpu_machine(name, rounds)
    rows = [report.row(result) for result in results]
    console.print(report.table(rows, torch.cuda.get_device_name()))
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(facts, results, None), indent=1) + "\n")
    if markdown_path is not None:
        markdown_path.write_text(report.markdown(facts, rows, None, "GPU"))
    verdicts = [verdict for result in results for verdict in result.verdicts]
    console.print(f"{len(verdicts)} requirements: {sum(v.met is False for v in verdicts)} missed")


if __name__ == "__main__":
    command()
