"""How calls are timed beside each other, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bnb_core.utils import sync_gpu


def interleaved_seconds(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, turn_seconds: float = 0.0
) -> dict[str, list[float]]:
    """The time of one call in each round, by name.

    In every round each call has one turn. A first round, of one call each, warms up and tells how many calls make
    a turn of ``turn_seconds``; a turn's time is the mean over its calls.
    """
    probe = torch.empty(0, device=device)

    def turn(call: Callable[[], Any], count: int) -> float:
        sync_gpu(probe)
        start = time.perf_counter()
        for _ in range(count):
            call()
        sync_gpu(probe)
        return (time.perf_counter() - start) / count

    for call in calls.values():
        call()
    counts = {name: max(1, round(turn_seconds / turn(call, 1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(turn(call, counts[name]))
    return times
