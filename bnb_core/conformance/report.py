"""What a run found: a support table, a JSON file, and where two such files differ."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from bnb_core.backend import Backend
from bnb_core.conformance.files import read_object
from bnb_core.conformance.runner import Result
from bnb_core.version import __version__

FORMAT = 1


def machine() -> dict[str, str]:
    """Where a run took place."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "bnb_core": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def support_table(results: Iterable[Result]) -> dict[str, dict[str, str]]:
    """Primitive to dtype to what came of its cases: "ok 27", "FAIL 2 of 27", and so on."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for result in results:
        dtype = result.case.traits.get("dtype", "any")
        by_status = counts.setdefault(result.case.primitive or "api", {}).setdefault(dtype, {})
        by_status[result.status] = by_status.get(result.status, 0) + 1
    return {
        primitive: {dtype: _cell(by_status) for dtype, by_status in by_dtype.items()}
        for primitive, by_dtype in counts.items()
    }


def _cell(by_status: dict[str, int]) -> str:
    total = sum(by_status.values())
    if by_status == {"ok": total}:
        return f"ok {total}"
    return ", ".join(f"{status} {count} of {total}" for status, count in sorted(by_status.items()))


def header(backend: Backend, device: torch.device) -> dict[str, Any]:
    """Where a report comes from: the backend, its instruction set in use, the machine."""
    return {
        "format": FORMAT,
        "machine": machine(),
        "backend": backend.name,
        "isa": backend.instruction_sets.current() if backend.instruction_sets else None,
        "details": backend.facts(),
        "device": str(device),
    }


def as_json(results: Sequence[Result], backend: Backend, device: torch.device, seed: int) -> dict[str, Any]:
    """The run as one JSON object, on the instruction set in use."""
    return {
        **header(backend, device),
        "seed": seed,
        "support": support_table(results),
        "cases": {
            result.case.id: {"status": result.status, "message": result.message, "digest": result.digest}
            for result in results
        },
    }


def load(path: Path) -> dict[str, Any]:
    """A file that :func:`as_json` was written to.

    Raises:
        ValueError: it is not one, or holds no case.
    """
    content = read_object(path, "a conformance report")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a conformance report of format {FORMAT}, got {content.get('format')!r}")
    if not isinstance(content.get("seed"), int):
        raise ValueError(f"{path}: seed: expected an int, got {content.get('seed')!r}")
    cases = content.get("cases")
    if not isinstance(cases, dict) or not cases:
        raise ValueError(f"{path}: cases: expected a JSON object with a case at least")
    for name, case in cases.items():
        if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in ("status", "digest")):
            raise ValueError(f"{path}: cases: {name}: expected an object with a status and a digest, got {case!r}")
    return content


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
    """Case and sentence for each case whose status or bits differ between two reports, or that one of them lacks.

    Raises:
        ValueError: the runs had different seeds, so their bits say nothing.
    """
    if a["seed"] != b["seed"]:
        raise ValueError(f"the reports have different seeds, {a['seed']} and {b['seed']}: their inputs differ")
    found = []
    for case in sorted(a["cases"].keys() | b["cases"].keys()):
        first, second = a["cases"].get(case), b["cases"].get(case)
        if first is None or second is None:
            found.append((case, f"only in the {'second' if first is None else 'first'} report"))
        elif first["status"] != second["status"]:
            found.append((case, f"{first['status']} and {second['status']}"))
        elif first["digest"] != second["digest"]:
            found.append((case, "other bits"))
    return found
