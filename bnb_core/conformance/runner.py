"""Runs cases against a backend and collects what came of them."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bnb_core import registry
from bnb_core.conformance.case import Case, Context, Failure

FAILING = ("FAIL", "unexpected pass")


class Skip(Exception):
    """A case cannot be run on this machine; the message says why."""


@dataclass(frozen=True)
class Result:
    """What came of one case. ``digest`` is of all the bits that its primitives gave."""

    case: Case
    status: str
    message: str
    seconds: float
    digest: str

    @property
    def failed(self) -> bool:
        return self.status in FAILING


class ExpectedFailures:
    """The failures that a backend's author knows of: a JSON object from case patterns (``*`` matches) to reasons."""

    def __init__(self, path: Path | None) -> None:
        self.reasons: dict[str, str] = {}
        if path is not None:
            content = json.loads(path.read_text())
            if not isinstance(content, dict) or not all(isinstance(reason, str) for reason in content.values()):
                raise ValueError(f"{path}: expected a JSON object from case patterns to reasons")
            self.reasons = content

    def reason(self, case: Case) -> str | None:
        return next((why for pattern, why in self.reasons.items() if fnmatch.fnmatchcase(case.id, pattern)), None)


def run_case(case: Case, context: Context, expected_failure: str | None = None) -> Result:
    """Run one case by the context's backend, strictly; it never raises."""
    start = time.perf_counter()
    context.start()
    status, message = "ok", ""
    try:
        with registry.use_backend(context.backend), registry.observe(context.observe):
            case.run(context)
        context.check_served(case)
    except Skip as skip:
        status, message = "skipped", str(skip)
    except Failure as failure:
        status, message = "FAIL", str(failure)
    except Exception as error:
        status, message = "FAIL", f"{type(error).__name__}: {error}"
    if expected_failure is not None and status in ("ok", "FAIL"):
        if status == "ok":
            status, message = "unexpected pass", f"was expected to fail: {expected_failure}"
        else:
            status, message = "expected failure", expected_failure
    return Result(case, status, message, time.perf_counter() - start, context.digest.hexdigest())


def run(
    cases: Sequence[Case],
    backend: registry.Backend,
    device: torch.device,
    seed: int = 0,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run the cases in order.

    Raises:
        ValueError: no case to run.
        BackendError: the backend is not available.
    """
    if not cases:
        raise ValueError("no conformance case was selected: nothing would be proved")
    expected = ExpectedFailures(backend.expected_failures)
    context = Context(backend.name, device, seed)
    results = []
    for case in cases:
        result = run_case(case, context, expected.reason(case))
        progress(result)
        results.append(result)
    return results


def backend_of(name: str) -> registry.Backend:
    """The backend of that name.

    Raises:
        BackendError: it is unknown, or not available (with the reason).
    """
    with registry.use_backend(name):
        return registry.backends()[name]


def device_of(backend: registry.Backend, device: str | None) -> torch.device:
    """The device to test on: the one asked for, else the first that the backend serves and this machine has."""
    if device is not None:
        chosen = torch.device(device)
        if not backend.serves(chosen.type):
            raise ValueError(f"device: backend {backend.name!r} serves {', '.join(backend.device_types)}, got {device}")
        return chosen
    if backend.serves("cpu"):
        return torch.device("cpu")
    return torch.device(backend.device_types[0])


@contextmanager
def instruction_set(backend: registry.Backend, name: str | None) -> Iterator[None]:
    """Have one of the backend's instruction sets serve, if a name is given, and check in the end that it still does.

    Raises:
        ValueError: the backend has no choice of instruction sets.
        RuntimeError: another one serves at the end, so the cases prove nothing about this one.
    """
    if name is None:
        yield
        return
    choice = backend.instruction_sets
    if choice is None:
        raise ValueError(f"isa: backend {backend.name!r} has no instruction sets to choose from, got {name!r}")
    before = choice.current()
    choice.select(name)
    try:
        yield
        if choice.current() != name:
            raise RuntimeError(f"the run began on {name} and ended on {choice.current()}")
    finally:
        choice.select(before)


def coverage_gaps(cases: Iterable[Case], required: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    """What the suite promises to test and does not: primitives and classes without a case, one sentence each."""
    covered: dict[str, set[tuple[str, str]]] = {}
    for case in cases:
        covered.setdefault(case.primitive, set()).update(case.traits.items())
    gaps = []
    for primitive in registry.primitive_names():
        if primitive not in covered:
            gaps.append(f"{primitive}: has no case")
        if primitive not in required:
            gaps.append(f"{primitive}: the suite does not say which classes it must cover")
        for trait, classes in required.get(primitive, {}).items():
            for value in classes:
                if (trait, value) not in covered.get(primitive, set()):
                    gaps.append(f"{primitive}: no case with {trait} {value}")
    return gaps
