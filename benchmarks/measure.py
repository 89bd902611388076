"""What a case is, and how one is measured: all its contenders take turns in one process."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

from bnb_core.conformance.timing import interleaved_seconds

TURN_SECONDS = 0.02
OURS = "bnb_core"


@dataclass
class Contender:
    """One way of doing a case's work.

    ``scale`` turns its time into what the case is held to: a probe that reads 64 MiB stands for a case that moves
    16 MiB with a scale of 1/4. A contender of kind ``limit`` is what the machine can do, ``peer`` other software.
    """

    call: Callable[[], Any]
    kind: str = "peer"
    scale: float = 1.0


@dataclass
class Requirement:
    """Our time is at most ``at_most`` times that of ``against``, or at most that many seconds if it is None."""

    against: str | None
    at_most: float

    def __str__(self) -> str:
        if self.against is None:
            return f"<= {self.at_most * 1e6:.0f} us"
        if self.at_most < 0.5:
            return f">= {1 / self.at_most:.2g}x {self.against}"
        if self.at_most > 1.0:
            return f"<= {self.at_most:.2f}x time of {self.against}" if self.is_own else self._share()
        return self._share()

    @property
    def is_own(self) -> bool:
        return self.against is not None and self.against.startswith(OURS)

    def _share(self) -> str:
        return f">= {1 / self.at_most:.0%} of {self.against}"


@dataclass
class Work:
    """A case made ready: its contenders, ours by the name ``OURS``, and what it is held to."""

    contenders: dict[str, Contender]
    requirements: Sequence[Requirement]
    moved_bytes: float = 0
    operations: float = 0


@dataclass
class Case:
    """Named work, prepared when its turn comes so that only one case's tensors are held at a time."""

    name: str
    prepare: Callable[[], Work]
    quick: bool = True


@dataclass
class Verdict:
    requirement: str
    reached: float | None
    met: bool | None


@dataclass
class Result:
    """Seconds by contender (scaled, one value per round), and what came of each requirement.

    A case that failed has no seconds and no verdicts; its remark says why.
    """

    name: str
    moved_bytes: float
    operations: float
    kinds: dict[str, str]
    seconds: dict[str, list[float]]
    verdicts: list[Verdict] = field(default_factory=list)
    load: float = 0.0
    remark: str = ""

    def median(self, contender: str) -> float:
        return statistics.median(self.seconds[contender])


CPU = torch.device("cpu")


def measure(case: Case, rounds: int, device: torch.device = CPU) -> Result:
    """Run a case whose calls are done when ``device`` is."""
    work = case.prepare()
    failures = _drop_failing_peers(work)
    calls = {name: contender.call for name, contender in work.contenders.items()}
    with torch.no_grad():
        raw = interleaved_seconds(calls, device, rounds, TURN_SECONDS)
    seconds = {name: [t * work.contenders[name].scale for t in times] for name, times in raw.items()}
    kinds = {name: contender.kind for name, contender in work.contenders.items()}
    result = Result(
        case.name, work.moved_bytes, work.operations, kinds, seconds, load=os.getloadavg()[0], remark=failures
    )
    result.verdicts = [_judge(requirement, result) for requirement in work.requirements]
    return result


def _drop_failing_peers(work: Work) -> str:
    """Peers that cannot do this work are left out; says which and why."""
    failures = []
    for name, contender in list(work.contenders.items()):
        if contender.kind != "peer":
            continue
        try:
            with torch.no_grad():
                contender.call()
        except Exception as error:
            del work.contenders[name]
            failures.append(failure(name, error))
    return "; ".join(failures)


def failure(name: str, error: Exception) -> str:
    """What failed and why, in one line."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{name} fails: {type(error).__name__}: {first_line}"


def measure_or_explain(case: Case, rounds: int, device: torch.device = CPU) -> Result:
    """The same, with the error as the remark where the case itself fails."""
    try:
        return measure(case, rounds, device)
    except Exception as error:
        return Result(case.name, 0, 0, {}, {}, remark=failure(case.name, error))


def _judge(requirement: Requirement, result: Result) -> Verdict:
    """``reached`` is our time over that of the contender, or in seconds; None where it could not be measured."""
    if requirement.against is not None and requirement.against not in result.seconds:
        return Verdict(str(requirement), None, None)
    reached = result.median(OURS)
    if requirement.against is not None:
        reached /= result.median(requirement.against)
    return Verdict(str(requirement), reached, reached <= requirement.at_most)


def rotating(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[[], Any]:
    """A call of ``function`` on the next of ``arguments`` each time, so that none is in a cache when it comes round."""
    turns: Iterator[Any] = cycle(arguments)
    return lambda: function(next(turns))
