"""The cases, a file for each section of docs/SPEC.md."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import combinations

from bnb_core.conformance.case import Case
from bnb_core.conformance.suite import (
    api,
    batch_invariance,
    errors,
    gemm_4bit,
    grouped,
    int8,
    large,
    nonfinite,
    optimizer,
    properties,
    quantize,
    step_in_memory,
    threads,
)

_FILES = (
    quantize,
    gemm_4bit,
    grouped,
    int8,
    optimizer,
    step_in_memory,
    nonfinite,
    errors,
    api,
    properties,
    threads,
    batch_invariance,
    large,
)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in the order in which they run.

    Raises:
        ValueError: two cases have one name.
    """
    cases = tuple(case for file in _FILES for case in file.cases())
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise ValueError(f"two conformance cases are named {case.id!r}")
        seen.add(case.id)
    return cases


COVERS = {"classes": 1, "pairs": 2}
"""What few cases may cover, and how many classes that is at a time."""


def covering(cases: Iterable[Case], cover: str) -> list[Case]:
    """Few of the cases, in order, that have every class of each primitive, or every two that any of them has together.

    Most faults show where two classes meet, such as a shape and a dtype (Kuhn, Wallace and Gallo, "Software fault
    interactions and implications for software testing", 2004). The case with most that none has yet comes next, the
    earlier one of equals. A case that tells no classes is kept.

    Args:
        cover: a key of COVERS.
    """
    cases = list(cases)
    missing = [_combinations(case, COVERS[cover]) for case in cases]
    kept = {i for i, combined in enumerate(missing) if not combined}
    seen: set[tuple[object, ...]] = set()
    heap = [(-len(combined), i) for i, combined in enumerate(missing) if combined]
    heapify(heap)
    while heap:
        most, i = heappop(heap)
        missing[i] -= seen
        if len(missing[i]) == -most:
            kept.add(i)
            seen |= missing[i]
        elif missing[i]:
            heappush(heap, (-len(missing[i]), i))
    return [cases[i] for i in sorted(kept)]


def _combinations(case: Case, size: int) -> set[tuple[object, ...]]:
    classes = sorted(case.traits.items())
    return {(case.primitive, *some) for some in combinations(classes, min(size, len(classes))) if some}


def required_classes() -> dict[str, dict[str, tuple[str, ...]]]:
    """For each primitive, the classes of each trait that must have a case."""
    required: dict[str, dict[str, tuple[str, ...]]] = {}
    for file in _FILES:
        for primitive, classes in file.REQUIRED.items():
            required.setdefault(primitive, {}).update(classes)
    return required
