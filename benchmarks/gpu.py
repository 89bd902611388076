"""The GPU backend beside its peers and the card's limits: `python benchmarks/gpu.py`; `gpu.sh` builds it first."""

from __future__ import annotations

import fnmatch
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click
import report
import sweep
import torch
from cpu import OUTPUT, QUICK_ROUNDS, ROUNDS
from gpu_cases import DEVICE, SHAPES, all_cases
from measure import Case, Result, measure_or_explain
from rich.console import Console
from rich.progress import track

from bnb_core import registry

KERNEL_MODULES = {name: f"bnb_core.backends.{name}._kernels" for name in ("cuda", "hip")}
"""Backends over csrc_cuda, whose kernels for 4-bit products a table chooses."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_path", type=OUTPUT, help="Write every round's times here, after each case.")
@click.option("--markdown", "markdown_path", type=OUTPUT, help="Write the table here, after each case.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True)
@click.option("--quick", is_flag=True, help=f"A selection of the cases, in {QUICK_ROUNDS} rounds.")
@click.option("--case", "pattern", default="*", help="Only the cases whose name matches this pattern.")
@click.option("--backend", default=None, help="The backend to time; default: the one that serves gemm_4bit there.")
@click.option(
    "--sweep",
    "table_path",
    type=OUTPUT,
    help="Time the kernels for 4-bit products instead, and write csrc_cuda/gemm_4bit_choices.h with the fastest here.",
)
def command(
    json_path: Path | None,
    markdown_path: Path | None,
    rounds: int,
    quick: bool,
    pattern: str,
    backend: str | None,
    table_path: Path | None,
) -> None:
    """Time bnb_core on the current GPU beside bitsandbytes, torch and what the card can do.

    A case that fails is reported, and the exit status is then 1.
    """
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no GPU")
    name = backend or registry.served_by("gemm_4bit", DEVICE)
    torch.manual_seed(0)
    if table_path is not None:
        return _sweep(name, table_path, json_path)
    rounds = QUICK_ROUNDS if quick else rounds
    chosen = [c for c in all_cases() if fnmatch.fnmatchcase(c.name, pattern) and (c.quick or not quick)]
    if not chosen:
        raise click.BadParameter(f"no case matches {pattern!r}", param_hint="--case")
    console = Console(width=200)
    facts = report.gpu_machine(name, rounds)
    device_name = torch.cuda.get_device_name()
    results: list[Result] = []
    with registry.use_backend(name), torch.no_grad():
        for result in track(_measured(chosen, rounds), "measuring", len(chosen), console=console, transient=True):
            results.append(result)
            if json_path is not None:
                json_path.write_text(json.dumps(report.as_json(facts, results, None), indent=1) + "\n")
            if markdown_path is not None:
                markdown_path.write_text(report.markdown(facts, [report.row(r) for r in results], None, "GPU"))
    console.print(report.table([report.row(result) for result in results], device_name))
    console.print(report.summary([verdict for result in results for verdict in result.verdicts]), highlight=False)
    failed = sum(not result.seconds for result in results)
    if failed or len(results) < len(chosen):
        console.print(f"{failed} cases failed, {len(chosen) - len(results)} were not run", highlight=False)
        raise SystemExit(1)


def _sweep(backend: str, table_path: Path, json_path: Path | None) -> None:
    if backend not in KERNEL_MODULES:
        raise click.UsageError(f"--sweep: expected one of {', '.join(KERNEL_MODULES)}, got the backend {backend!r}")
    module = import_module(KERNEL_MODULES[backend])
    console = Console(width=200)
    facts = report.gpu_machine(backend, sweep.ROUNDS)

    def show(point: sweep.Point) -> None:
        ranked = sorted(point.seconds.items(), key=lambda kernel: kernel[1])
        times = ", ".join(f"{kernel} {report.duration(seconds)}" for kernel, seconds in ranked)
        console.print(f"M={point.M} {point.shape[0]}x{point.shape[1]}: {times}", highlight=False)

    try:
        with registry.use_backend(backend), torch.no_grad():
            points = sweep.sweep(module, sweep.ROWS, SHAPES, sweep.SECONDS, show)
    except (sweep.OutOfTime, AssertionError) as error:
        raise click.ClickException(f"{error}; nothing was written") from error
    if json_path is not None:
        content = {"machine": facts, "points": [asdict(point) for point in points]}
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    chip = int("".join(map(str, torch.cuda.get_device_capability())))
    remark = f"Measured on {torch.cuda.get_device_name()}, {facts['date']}."
    table = sweep.table_with(sweep.TABLE.read_text(), chip, remark, sweep.choices(chip, points))
    table_path.write_text(table)
    console.print(f"{table_path} has the fastest kernels of {len(points)} products; build with it to use them")


def _measured(cases: Sequence[Case], rounds: int) -> Iterator[Result]:
    """One result after the other, up to an error of a kernel, after which the device answers no call."""
    for case in cases:
        result = measure_or_explain(case, rounds, torch.device(DEVICE))
        gc.collect()
        error = _lasting_error()
        if error is not None:
            result.remark = f"{result.remark}; the device answers no more: {error}".removeprefix("; ")
        yield result
        if error is not None:
            return


def _lasting_error() -> Exception | None:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return error
    return None


if __name__ == "__main__":
    command()
