"""The CPU backend beside its peers and the machine's limits: `python benchmarks/cpu.py`.

Peers that are not installed are left out: `pip install bitsandbytes torchao` brings them.
"""

from __future__ import annotations

import fnmatch
import gc
import json
from pathlib import Path

import click
import memory
import report
import torch
from cases import all_cases
from measure import measure
from rich.console import Console
from rich.progress import track

ROUNDS = 9
QUICK_ROUNDS = 3
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_path", type=OUTPUT, help="Write every round's times here.")
@click.option("--markdown", "markdown_path", type=OUTPUT, help="Write the table here.")
@click.option("--plot", "plot_path", type=OUTPUT, help="Write a roofline plot (PNG) here.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and of bnb_core; default: torch's choice.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True, help="In which all take turns."
)
@click.option("--quick", is_flag=True, help=f"A selection of the cases, in {QUICK_ROUNDS} rounds.")
@click.option("--case", "pattern", default="*", help="Only the cases whose name matches this pattern.")
@click.option("--check", is_flag=True, help="Exit with 1 if a requirement is missed.")
def command(
    json_path: Path | None,
    markdown_path: Path | None,
    plot_path: Path | None,
    threads: int | None,
    rounds: int,
    quick: bool,
    pattern: str,
    check: bool,
) -> None:
    """Time bnb_core on the CPU beside bitsandbytes, torch, torchao and what the machine can do."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    rounds = QUICK_ROUNDS if quick else rounds
    chosen = [c for c in all_cases() if fnmatch.fnmatchcase(c.name, pattern) and (c.quick or not quick)]
    if not chosen:
        raise click.BadParameter(f"no case matches {pattern!r}", param_hint="--case")
    console = Console()
    peak = memory.quantizing()
    results = []
    for case in track(chosen, "measuring", console=console, transient=True):
        results.append(measure(case, rounds))
        gc.collect()
    facts = report.machine(torch.get_num_threads(), rounds)
    rows = [report.row(result) for result in results]
    console.print(report.table(rows))
    if peak is not None:
        console.print(f"{report.reached(peak)}: {report.MARKS[peak.met]}", highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(facts, results, peak), indent=1) + "\n")
    if markdown_path is not None:
        markdown_path.write_text(report.markdown(facts, rows, peak))
    if plot_path is not None:
        report.plot(results, plot_path)
    verdicts = [verdict for result in results for verdict in result.verdicts] + ([peak] if peak else [])
    console.print(report.summary(verdicts))
    if check and any(verdict.met is False for verdict in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    command()
