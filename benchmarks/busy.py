"""Small calls on a machine that other programs keep busy: `python benchmarks/busy.py`.

As many threads as torch has beside one thread, while other processes spin on the cores: a call that waits for a thread
which has no core takes some ten milliseconds. Means, since it is the waits that count.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bnb_core import functional, optim
from bnb_core.cli.info import cpu_model

SIZES = (256, 512, 1024, 2048)
AT_MOST = 3.0
"""Times as long as with one thread."""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()


def calls(size: int) -> dict[str, Callable[[], Any]]:
    weight = torch.randn(size, size)
    packed, state = functional.quantize_nf4(weight)
    codes, blockwise = functional.quantize_blockwise(weight)
    row, rows = torch.randn(1, size, dtype=torch.bfloat16), torch.randn(16, size, dtype=torch.bfloat16)
    int8, _, _ = functional.int8_vectorwise_quant(weight)
    p = torch.nn.Parameter(weight.clone())
    p.grad = torch.randn_like(p)
    adam = optim.Adam8bit([p])
    return {
        "gemv_4bit": lambda: functional.gemv_4bit(row, packed.t(), state=state),
        "gemm_4bit, 16 rows": lambda: functional.gemm_4bit(rows, packed, state),
        "dequantize_4bit": lambda: functional.dequantize_4bit(packed, state),
        "quantize_4bit": lambda: functional.quantize_nf4(weight),
        "quantize_blockwise": lambda: functional.quantize_blockwise(weight),
        "dequantize_blockwise": lambda: functional.dequantize_blockwise(codes, blockwise),
        "int8_vectorwise_quant": lambda: functional.int8_vectorwise_quant(weight),
        "int8_linear_matmul, 16 rows": lambda: functional.int8_linear_matmul(int8[:16], int8),
        "Adam8bit step": adam.step,
    }


def mean_seconds(call: Callable[[], Any], seconds: float) -> float:
    call()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return (time.perf_counter() - start) / count


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--loops", type=click.IntRange(min=0), help="Busy processes beside ours; default: two a thread.")
@click.option("--seconds", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="For each figure.")
def command(loops: int | None, seconds: float) -> None:
    """Time small calls with one thread and with all, on busy cores."""
    threads = torch.get_num_threads()
    count = 2 * threads if loops is None else loops
    table = Table("case", "size", "1 thread", f"{threads} threads", "ratio", "at most", "met")
    table.title = f"{cpu_model()}, {count} busy loops"
    with busy_loops(count):
        for size in SIZES:
            for name, call in calls(size).items():
                means = []
                for number in (1, threads):
                    torch.set_num_threads(number)
                    means.append(mean_seconds(call, seconds))
                ratio = means[1] / means[0]
                figures = [f"{mean * 1e6:.0f} us" for mean in means]
                met = "yes" if ratio <= AT_MOST else "NO"
                table.add_row(name, str(size), *figures, f"{ratio:.2f}", f"{AT_MOST:g}", met)
    Console(width=120).print(table)


if __name__ == "__main__":
    command()
