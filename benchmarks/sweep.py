"""Which kernel for products with a 4-bit weight is the fastest on this card, as the table that csrc_cuda reads."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_cases
import torch
from measure import TURN_SECONDS

from bnb_core import primitives
from bnb_core.conformance.timing import interleaved_seconds
from bnb_core.records import Weight4bit

TABLE = Path(__file__).parents[1] / "csrc_cuda" / "gemm_4bit_choices.h"
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
ROUNDS = 3
SECONDS = 360
"""At most so long; a sweep of one H200 is meant to take less."""
ANY_NUMBER = "kAnyNumber"
ANY_CHIP = "kAnyChip"

Shape = tuple[int, int]


class OutOfTime(Exception):
    """The sweep was not done in the time that it has."""


@dataclass(frozen=True)
class Point:
    """A product of M rows with a weight of N x K: the seconds that each kernel takes for it."""

    M: int
    shape: Shape
    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)


def is_worth_timing(kernel: str, M: int) -> bool:
    """Kernels are left out where they read the weight very often, or multiply mostly rows that are not there."""
    if kernel == "dense":
        return M >= 16
    if kernel == "wgmma":
        return M >= 32
    if kernel == "f32":
        return M <= 8
    rows = int(re.findall(r"\d+", kernel)[0])
    return rows / 2 < max(M, 5) <= 4 * rows


def sweep(
    module: ModuleType,
    rows: Sequence[int],
    shapes: Sequence[Shape],
    limit_seconds: float,
    report: Callable[[Point], Any],
) -> list[Point]:
    """Time every kernel of the module wherever it takes the product, once its result was found right.

    Raises:
        OutOfTime: it takes more than ``limit_seconds``.
        AssertionError: a kernel's result is wrong.
    """
    end = time.monotonic() + limit_seconds
    points = []
    for N, K in shapes:
        weights = gpu_cases.copies(lambda N=N, K=K: (_weight(N, K),), N * K / 2)
        dequantized = primitives.dequantize_4bit(weights[0][0], torch.bfloat16)
        for M in rows:
            if time.monotonic() > end:
                raise OutOfTime(f"{limit_seconds:.0f} s were over before M={M} {N}x{K}")
            point = Point(M, (N, K), _seconds(module, M, weights, dequantized))
            points.append(point)
            report(point)
    return points


def _weight(N: int, K: int) -> Weight4bit:
    values = torch.randn(N, K, device=gpu_cases.DEVICE, dtype=torch.bfloat16)
    packed, absmax = primitives.quantize_4bit(values, 64, "nf4", torch.uint8)
    return Weight4bit(packed, (N, K), absmax, 64, "nf4")


def _seconds(
    module: ModuleType, M: int, weights: list[tuple[Weight4bit]], dequantized: torch.Tensor
) -> dict[str, float]:
    """Of each kernel that takes the product, the median of rounds in which they take turns."""
    A = torch.randn(M, dequantized.shape[1], device=gpu_cases.DEVICE, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(A, dequantized)
    contenders = {}
    for kernel in module.gemm_4bit_kernels:
        if not is_worth_timing(kernel, M):
            continue
        with asked_for(module, kernel):
            if module.gemm_4bit_kernels[module.gemm_4bit_kernel(A, weights[0][0])] != kernel:
                continue
            difference = f"the kernel {kernel} with {M} rows of A is wrong: "
            torch.testing.assert_close(
                primitives.gemm_4bit(A, weights[0][0], None),
                expected,
                rtol=2**-7,
                atol=2**-7 * A.shape[1] ** 0.5,
                msg=lambda found, difference=difference: difference + found,
            )
            contenders[kernel] = gpu_cases.graphed(lambda weight: primitives.gemm_4bit(A, weight, None), weights, "own")
    calls = {kernel: contender.call for kernel, contender in contenders.items()}
    times = interleaved_seconds(calls, torch.device(gpu_cases.DEVICE), ROUNDS, TURN_SECONDS)
    return {kernel: statistics.median(times[kernel]) * contenders[kernel].scale for kernel in calls}


@contextmanager
def asked_for(module: ModuleType, kernel: str) -> Iterator[None]:
    """This kernel serves within it; a graph goes on doing what it did when it was captured."""
    before = module.set_gemm_4bit_kernel(module.gemm_4bit_kernels.index(kernel))
    try:
        yield
    finally:
        module.set_gemm_4bit_kernel(before)


def choices(chip: int, points: Sequence[Point]) -> list[str]:
    """The rows of the table: up to each number of rows of A that was timed, the fastest kernel by size of the weight.

    Between two sizes the geometric mean parts them. Products of more rows than were timed have no row.
    """
    sizes = sorted({N * K for point in points for N, K in [point.shape]})
    bounds = [str(round((a * b) ** 0.5)) for a, b in pairwise(sizes)] + [ANY_NUMBER]
    by_rows = []
    for M in sorted({point.M for point in points}):
        fastest = {p.shape[0] * p.shape[1]: p.fastest for p in points if p.M == M}
        by_size = [(fastest[size], bound) for size, bound in zip(sizes, bounds, strict=True)]
        merged = [(kernel, list(same)[-1][1]) for kernel, same in groupby(by_size, key=lambda row: row[0])]
        by_rows.append((M, merged))
    last_of_equals = [list(same)[-1] for _, same in groupby(by_rows, key=lambda row: row[1])]
    return [
        f"    {{{chip}, {M}, {bound}, Gemm4bitKernel::{kernel}}},"
        for M, by_size in last_of_equals
        for kernel, bound in by_size
    ]


def table_with(text: str, chip: int, remark: str, rows: Sequence[str]) -> str:
    """The table's file with these rows in place of what it has for the chip; those of other chips stay."""
    head, rest = text.split("kGemm4bitChoices[] = {\n")
    body, tail = rest.split("};\n", 1)
    blocks: dict[str, list[str]] = {}
    comments: list[str] = []
    for line in body.splitlines():
        found = re.match(r"    \{(\w+), ", line)
        if found is None:
            comments.append(line)
        else:
            blocks.setdefault(found[1], []).extend([*comments, line])
            comments = []
    blocks[str(chip)] = [f"    // {remark}", *rows]
    ordered = sorted(blocks, key=lambda name: (name == ANY_CHIP, int(name) if name.isdecimal() else 0))
    lines = [line for name in ordered for line in blocks[name]]
    return "\n".join([f"{head}kGemm4bitChoices[] = {{", *lines, f"}};\n{tail}"])
