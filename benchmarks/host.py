"""What a call costs the host: `python benchmarks/host.py`. It needs no GPU.

A backend whose kernels do nothing serves tiny tensors, so that our time is the host's alone; torch's own modules beside
it, in the same process and in turn, do their work as well.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bnb_core import functional, optim, registry
from bnb_core import nn as quantized
from bnb_core.backend import Backend, Kernel
from bnb_core.cli.info import cpu_model
from bnb_core.conformance.timing import interleaved_seconds

SIZE, ROWS = 64, 4
PARAMETERS, ENTRIES = 100, 4096
ROUNDS = 15
TURN_SECONDS = 0.02


class Comparison(NamedTuple):
    """Ours beside torch's, and how many times its time ours may take; or how many microseconds, where it has none."""

    ours: Callable[[], Any]
    torchs: Callable[[], Any] | None
    at_most: float


@contextmanager
def kernels_that_do_nothing() -> Iterator[None]:
    """For CPU tensors; they take many parameters in one call, as ours do."""

    def nothing(*arguments: Any, out: Any = None) -> None:
        pass

    kernels = dict.fromkeys(registry.primitive_names(), Kernel(nothing, several=nothing))
    with registry.registered(Backend("nothing", ("cpu",), 1000, kernels)):
        yield


def _forward(layer: nn.Module) -> Callable[[], Any]:
    x = torch.randn(ROWS, SIZE)

    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _forward_backward(layer: nn.Module) -> Callable[[], Any]:
    x, gradient = torch.randn(ROWS, SIZE, requires_grad=True), torch.randn(ROWS, SIZE)

    def call() -> None:
        layer(x).backward(gradient)
        x.grad = None

    return call


def _steps(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[], Any]:
    parameters = [nn.Parameter(torch.randn(ENTRIES)) for _ in range(PARAMETERS)]
    for parameter in parameters:
        parameter.grad = torch.randn(ENTRIES)
    optimizer = kind(parameters, lr=1e-3, **settings)
    optimizer.step()
    return optimizer.step


def _gemv() -> Callable[[], Any]:
    packed, state = functional.quantize_nf4(torch.randn(SIZE, SIZE))
    x, weight = torch.randn(1, SIZE), packed.t()
    return lambda: functional.gemv_4bit(x, weight, state=state)


def comparisons() -> dict[str, Comparison]:
    dense = nn.Linear(SIZE, SIZE).requires_grad_(False)
    layer_4bit = quantized.LinearNF4(SIZE, SIZE, compute_dtype=torch.float32).to("cpu").requires_grad_(False)
    layer_8bit = quantized.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False).to("cpu").requires_grad_(False)
    fused = _steps(torch.optim.AdamW, fused=True)
    return {
        "Linear4bit forward": Comparison(_forward(layer_4bit), _forward(dense), 1.5),
        "Linear4bit forward + backward": Comparison(_forward_backward(layer_4bit), _forward_backward(dense), 1.5),
        "Linear8bitLt forward": Comparison(_forward(layer_8bit), _forward(dense), 2),
        "Linear8bitLt forward + backward": Comparison(_forward_backward(layer_8bit), _forward_backward(dense), 2),
        "AdamW8bit step": Comparison(_steps(optim.AdamW8bit, min_8bit_size=ENTRIES), fused, 1.5),
        "PagedAdamW8bit step": Comparison(_steps(optim.PagedAdamW8bit, min_8bit_size=ENTRIES), fused, 2),
        "AdamW32bit step": Comparison(_steps(optim.AdamW32bit), fused, 1.5),
        "gemv_4bit": Comparison(_gemv(), None, 5e-6),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True)
@click.option("--real", is_flag=True, help="With the kernels that serve otherwise.")
def command(json_path: Path | None, rounds: int, real: bool) -> None:
    """Time calls on tiny tensors beside torch's own."""
    torch.set_num_threads(1)
    cases = comparisons()
    calls = {f"{name}/ours": case.ours for name, case in cases.items()}
    calls |= {f"{name}/torch": case.torchs for name, case in cases.items() if case.torchs}
    if real:
        seconds = _medians(calls, rounds)
    else:
        with kernels_that_do_nothing():
            seconds = _medians(calls, rounds)
    table = Table("case", "ours", "torch", "ratio", "at most", "met", title=f"{cpu_model()}, {os.cpu_count()} cores")
    results = {}
    for name, case in cases.items():
        ours, torchs = seconds[f"{name}/ours"], seconds.get(f"{name}/torch")
        value = ours / torchs if torchs else ours
        limit = f"{case.at_most:g}" if torchs else f"{case.at_most * 1e6:g} us"
        ratio = f"{value:.2f}" if torchs else ""
        shown = f"{torchs * 1e6:.1f} us" if torchs else ""
        table.add_row(name, f"{ours * 1e6:.1f} us", shown, ratio, limit, "yes" if value <= case.at_most else "NO")
        results[name] = {"ours": ours, "torch": torchs, "at_most": case.at_most}
    Console(width=120).print(table)
    if json_path:
        json_path.write_text(json.dumps({"cpu": cpu_model(), "kernels": "real" if real else "none", "cases": results}))


def _medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    seconds = interleaved_seconds(calls, torch.device("cpu"), rounds, TURN_SECONDS)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    command()
