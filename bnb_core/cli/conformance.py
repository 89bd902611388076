"""`bnb-core conformance`: hold a backend to docs/SPEC.md, and compare two such runs."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bnb_core import registry
from bnb_core.backend import Backend
from bnb_core.conformance import report, runner, suite
from bnb_core.conformance.case import Case
from bnb_core.conformance.suite import all_cases, required_classes
from bnb_core.conformance.values import DTYPES, dtype_name

from .bench import time_primitives
from .errors import BadInput
from .json_report import json_option, write_json

EVERY_ISA = "all"

SUMMARY = {
    "ok": "passed",
    "FAIL": "failed",
    "unexpected pass": "failed",
    "expected failure": "failed as expected",
    "skipped": "skipped",
}
"""What the last line of a run counts, from the status of a case."""


@click.group(invoke_without_command=True)
@click.option("--backend", "backend_name", help="The backend to test; `bnb-core info` lists them.  [required]")
@click.option("--isa", default=None, help="Instruction set of a cpu backend, or `all`; default: the one in use.")
@click.option("--primitive", "primitives", multiple=True, help="Only this primitive; may be repeated. `api`: the API.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice([dtype_name(dtype) for dtype in DTYPES]),
    help="Only cases of this dtype, and those without one; may be repeated.",
)
@click.option("--case", "pattern", default="*", help="Only cases whose name matches this pattern.")
@click.option(
    "--cover",
    type=click.Choice([*suite.COVERS]),
    help="Only few cases that have every class, or every two classes together.",
)
@click.option("--device", default=None, help="torch device; default: the backend's first.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the random inputs.")
@click.option("--thorough", is_flag=True, help="Also the cases that need minutes or gigabytes.")
@click.option("--perf", is_flag=True, help="Time each primitive instead of testing it.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    backend_name: str | None,
    isa: str | None,
    primitives: Sequence[str],
    dtypes: Sequence[str],
    pattern: str,
    cover: str | None,
    device: str | None,
    seed: int,
    thorough: bool,
    perf: bool,
    json_path: Path | None,
) -> None:
    """Hold a backend to the contract: exit code 0 only if every case passes, none is missing and some were run."""
    if context.invoked_subcommand is not None:
        return
    selected = bool(primitives or dtypes) or pattern != "*"
    if perf and (selected or thorough or cover):
        others = "--primitive, --dtype, --case, --cover and --thorough"
        raise BadInput(f"--perf: times every primitive, without {others}; leave them out")
    if backend_name is None:
        raise BadInput(f"--backend: expected one of {', '.join(registry.backends())}, got nothing")
    try:
        backend = registry.available_backend(backend_name)
        chosen_device = runner.device_of(backend, device)
        cases = select_cases(primitives, dtypes, pattern, thorough)
        if cover:
            cases = suite.covering(cases, cover)
        isas = chosen_isas(backend, isa)
        expected = runner.ExpectedFailures(backend.expected_failures)
    except ValueError as error:
        raise BadInput(str(error)) from None
    console = Console()
    missing = [] if selected or perf else missing_cases(expected)
    for sentence in missing:
        console.print(sentence, style="red", highlight=False, markup=False)
    failed = bool(missing)
    reports = []
    for name in isas:
        with runner.instruction_set(backend, name):
            if perf:
                reports.append(time_primitives(console, backend, chosen_device))
            else:
                results = run_on(console, backend, name, chosen_device, cases, seed)
                reports.append(report.as_json(results, backend, chosen_device, seed))
                failed |= any(result.failed for result in results) or runner.nothing_proved(results)
    write_json(json_path, reports[0] if len(reports) == 1 else reports)
    context.exit(1 if failed else 0)


@command.command()
@click.argument("first", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("second", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_context
def compare(context: click.Context, first: Path, second: Path) -> None:
    """Say where the bits of two reports (--json of one instruction set each) differ; exit code 1 if they do."""
    try:
        a, b = report.load(first), report.load(second)
        found = report.differences(a, b)
    except ValueError as error:
        raise BadInput(str(error)) from None
    for case, sentence in found:
        click.echo(f"{case}: {sentence}")
    click.echo(f"{len(found)} of {len(a['cases'].keys() | b['cases'].keys())} cases differ")
    context.exit(1 if found else 0)


def select_cases(primitives: Sequence[str], dtypes: Sequence[str], pattern: str, thorough: bool) -> list[Case]:
    """The cases that were asked for.

    Raises:
        ValueError: an unknown primitive, or nothing matches.
    """
    known = ["api", *registry.primitive_names()]
    for name in primitives:
        if name not in known:
            raise ValueError(f"--primitive: expected one of {', '.join(known)}, got {name!r}")
    left_out = {dtype_name(dtype) for dtype in DTYPES}.difference(dtypes) if dtypes else ()
    cases = [
        case
        for case in all_cases()
        if (not primitives or (case.primitive or "api") in primitives)
        and case.traits.get("dtype") not in left_out
        and fnmatch.fnmatchcase(case.name, pattern)
        and (thorough or not case.large)
    ]
    if not cases:
        raise ValueError(f"--case: no case matches {pattern!r}; the report that --json writes lists them")
    return cases


def missing_cases(expected: runner.ExpectedFailures) -> list[str]:
    """What a full run should test and cannot, one sentence each."""
    return [
        *(f"not covered: {gap}" for gap in runner.coverage_gaps(all_cases(), required_classes())),
        *(f"expected failure {pattern!r} matches no case" for pattern in expected.dead(all_cases())),
    ]


def chosen_isas(backend: Backend, isa: str | None) -> list[str | None]:
    """The instruction sets to run on, in turn; None for a backend that has no choice."""
    if backend.instruction_sets is None:
        if isa is not None:
            raise ValueError(
                f"--isa: backend {backend.name!r} has no instruction sets to choose from, got {isa!r}; leave it out"
            )
        return [None]
    available = backend.instruction_sets.available()
    if isa is None:
        return [backend.instruction_sets.current()]
    if isa != EVERY_ISA and isa not in available:
        raise ValueError(f"--isa: expected all, {', '.join(available)}, got {isa!r}")
    return list(available) if isa == EVERY_ISA else [isa]


def run_on(
    console: Console, backend: Backend, isa: str | None, device: torch.device, cases: Sequence[Case], seed: int
) -> list[runner.Result]:
    """Run the cases with a progress bar, and print what failed and the support table."""
    title = escape(f"{backend.name}{f' ({isa})' if isa else ''} on {device}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(cases))
        results = runner.run(cases, backend, device, seed, lambda result: progress.advance(task))
    for result in results:
        if result.failed or result.status == "skipped":
            console.print(f"{result.status} {result.case.id}: {result.message}", highlight=False, markup=False)
    show_support(console, title, results)
    return results


def show_support(console: Console, title: str, results: Sequence[runner.Result]) -> None:
    support = report.support_table(results)
    dtypes = list(dict.fromkeys(dtype for by_dtype in support.values() for dtype in by_dtype))
    table = Table("primitive", *dtypes, title=title, title_justify="left")
    for primitive, by_dtype in support.items():
        table.add_row(primitive, *(by_dtype.get(dtype, "") for dtype in dtypes))
    console.print(table)
    seconds = sum(result.seconds for result in results)
    counts = Counter(SUMMARY[result.status] for result in results)
    summary = ", ".join(f"{counts[name]} {name}" for name in dict.fromkeys(SUMMARY.values()))
    console.print(f"{len(results)} cases in {seconds:.1f} s: {summary}")
    if runner.nothing_proved(results):
        console.print("every case was skipped: nothing was proved", style="red")
