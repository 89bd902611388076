"""Runs cases against a backend and collects what came of them."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bnb_core import registry
from bnb_core.backend import Backend
from bnb_core.checks import check_device
from bnb_core.conformance.case import Case, Context, Failure
from bnb_core.conformance.files import read_object

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
    """The failures that a backend's author knows of: a JSON object from case patterns (``*`` matches) to reasons.

    Raises:
        ValueError: the file holds something else, or cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self.reasons: dict[str, str] = {} if path is None else read_object(path, "expected failures")
        for pattern, reason in self.reasons.items():
            if not isinstance(reason, str):
                raise ValueError(f"{path}: {pattern}: expected the reason as a string, got {reason!r}")

    def reason(self, case: Case) -> str | None:
        return next((why for pattern, why in self.reasons.items() if fnmatch.fnmatchcase(case.id, pattern)), None)

    def dead(self, cases: Iterable[Case]) -> list[str]:
        """The patterns that match none of the cases."""
        names = [case.id for case in cases]
        return [pattern for pattern in self.reasons if not fnmatch.filter(names, pattern)]


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
    backend: Backend,
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


def nothing_proved(results: Sequence[Result]) -> bool:
    """Whether every case was skipped."""
    return all(result.status == "skipped" for result in results)


def device_of(backend: Backend, device: str | None) -> torch.device:
    """The device to test on: the one asked for, else the CPU if the backend serves it, else the first that it serves.

    Raises:
        ValueError: the backend does not serve it, or this machine does not have it.
    """
    if device is None:
        device = "cpu" if backend.serves("cpu") else next(iter(backend.device_types), "cpu")
    if not backend.serves(device.partition(":")[0]):
        served = ", ".join(backend.device_types) or "none"
        raise ValueError(f"device: backend {backend.name!r} serves {served}, got {device!r}")
    return check_device("device", device)


@contextmanager
def instruction_set(backend: Backend, name: str | None) -> Iterator[None]:
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
