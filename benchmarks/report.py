"""The results as a table, as JSON, as Markdown and as a roofline plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from limits import ROTATED_BYTES
from measure import OURS, Result, Verdict
from rich.table import Table

from bnb_core import registry
from bnb_core.cli.info import cpu_model, version_of

COLUMNS = ("case", "ours", "GB/s", "GFLOP/s", "limit", "of limit", "peers (their time / ours)", "required", "met")
MARKS = {True: "yes", False: "NO", None: "not measured"}


def machine(threads: int, rounds: int) -> dict[str, Any]:
    """What the figures depend on; nothing that names the host."""
    backend = registry.backends()["cpu"]
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction set": backend.details().get("isa", "none") if backend.available else "none",
        "threads": threads,
        "rounds": rounds,
        "rotated over": f"{ROTATED_BYTES / 2**20:.0f} MiB",
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("bnb_core", "torch", "bitsandbytes", "torchao")},
    }


def gpu_machine(backend: str, rounds: int) -> dict[str, Any]:
    """The same for a GPU."""
    properties = torch.cuda.get_device_properties()
    return {
        "date": date.today().isoformat(),
        "GPU": properties.name,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": properties.multi_processor_count,
        "backend": backend,
        **registry.backends()[backend].details(),
        "CUDA or ROCm of torch": torch.version.cuda or torch.version.hip,
        "rounds": rounds,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("bnb_core", "torch", "bitsandbytes")},
    }


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def own_name(result: Result) -> str:
    """The contender that a row is about: ours, or in the first rows the machine."""
    return OURS if OURS in result.seconds else next(iter(result.seconds))


def limit_name(result: Result) -> str | None:
    """The limit of a case: the one its time is held to."""
    return next((name for name, kind in result.kinds.items() if kind == "limit" and name != own_name(result)), None)


def reached(verdict: Verdict) -> str:
    """`required (reached)`."""
    return verdict.requirement if verdict.reached is None else f"{verdict.requirement} ({_amount(verdict)})"


def _amount(verdict: Verdict) -> str:
    value = verdict.reached
    assert value is not None
    if "MiB" in verdict.requirement:
        return f"{value:.0f} MiB"
    if verdict.requirement.endswith(" us"):
        return f"{value * 1e6:.1f} us"
    if "% of" in verdict.requirement:
        return f"{1 / value:.0%}"
    return f"{1 / value:.1f}x" if verdict.requirement.startswith(">=") else f"{value:.2f}x"


def summary(verdicts: Sequence[Verdict]) -> str:
    missed, unmeasured = (sum(verdict.met is met for verdict in verdicts) for met in (False, None))
    return f"{len(verdicts)} requirements: {missed} missed, {unmeasured} not measured"


def row(result: Result) -> tuple[str, ...]:
    if not result.seconds:
        cells = {"case": result.name, "peers (their time / ours)": result.remark}
        return tuple(cells.get(column, "") for column in COLUMNS)
    own = own_name(result)
    ours = result.median(own)
    limit = limit_name(result)
    others = [n for n in result.seconds if n not in (own, limit)]
    return (
        result.name,
        duration(ours),
        f"{result.moved_bytes / ours / 1e9:.1f}" if result.moved_bytes else "",
        f"{result.operations / ours / 1e9:.0f}" if result.operations else "",
        f"{limit}: {duration(result.median(limit))}" if limit else "",
        f"{result.median(limit) / ours:.0%}" if limit else "",
        "; ".join(
            [f"{n} {duration(result.median(n))} ({result.median(n) / ours:.1f}x)" for n in others]
            + ([result.remark] if result.remark else [])
        ),
        "; ".join(map(reached, result.verdicts)),
        "; ".join(MARKS[v.met] for v in result.verdicts),
    )


def table(rows: Sequence[tuple[str, ...]], device: str = "CPU") -> Table:
    shown = Table(*COLUMNS, title=f"{device}: medians of interleaved rounds", title_justify="left")
    for cells in rows:
        shown.add_row(*cells)
    return shown


def markdown(
    facts: dict[str, Any], rows: Sequence[tuple[str, ...]], memory: Verdict | None, device: str = "CPU"
) -> str:
    lines = [f"# {device} benchmark of {facts['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    if memory is not None:
        lines.append(f"- {reached(memory)}: {MARKS[memory.met]}")
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def as_json(facts: dict[str, Any], results: Sequence[Result], memory: Verdict | None) -> dict[str, Any]:
    return {
        "machine": facts,
        "memory": None if memory is None else vars(memory),
        "cases": [{**vars(r), "verdicts": [vars(v) for v in r.verdicts]} for r in results],
    }


def plot(results: Sequence[Result], path: Path) -> None:
    """A roofline: every case that moves bytes and computes, under the read bandwidth and torch's dense matmuls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    by_name = {result.name: result for result in results}
    figure, axes = plt.subplots(figsize=(10, 6))
    intensity = np.logspace(-1, 4, 200)
    read = by_name.get("limit/read")
    bandwidth = read.moved_bytes / read.median("machine") if read else float("inf")
    for result in results:
        if result.name.startswith("limit/dense"):
            peak = result.operations / result.median("machine")
            axes.plot(intensity, np.minimum(peak, bandwidth * intensity) / 1e9, label=result.name)
    points = [r for r in results if r.operations and r.moved_bytes and OURS in r.seconds]
    for contender, marker in ((OURS, "o"), ("bitsandbytes", "x")):
        shown = [r for r in points if contender in r.seconds]
        axes.plot(
            [r.operations / r.moved_bytes for r in shown],
            [r.operations / r.median(contender) / 1e9 for r in shown],
            marker,
            label=contender,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="GFLOP/s")
    axes.set_title(f"{torch.get_num_threads()} threads")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
