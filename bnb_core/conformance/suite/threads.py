"""What the number of torch's threads must not change: cases of other files, with one thread and with two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnb_core import registry
from bnb_core.conformance.case import Case, Context
from bnb_core.conformance.compare import same_bits
from bnb_core.conformance.runner import Skip
from bnb_core.conformance.suite import gemm_4bit, grouped, int8, optimizer, quantize
from bnb_core.primitive import Primitive

CHOSEN: tuple[tuple[ModuleType, dict[str, tuple[str, ...]]], ...] = (
    (quantize, {"shape": ("more blocks than a nested one",), "dtype": ("float32",)}),
    (gemm_4bit, {"shape": ("4 rows, N and K long", "5 rows", "260 rows, K a multiple of 64")}),
    (grouped, {"shape": ("more than a thread's share", "130 rows")}),
    (int8, {"shape": (int8.MORE_THAN_A_SHARE,), "dtype": ("float32", "int8"), "outliers": ("3",)}),
    (int8, {"shape": ("5 rows", "260 rows")}),
    (optimizer, {"shape": ("many blocks",), "dtype": ("float32",)}),
)
"""Files, and the traits of the cases of each that are chosen.

Most shapes are too small for a kernel to wake a second thread. "5 rows" is one that MKL adds up in another order then.
"""

PLAIN = {"layout": ("contiguous",), "values": ("normal", "random")}
"""Those of all of them."""

SUMS_OF_PRODUCTS = (
    *("gemm_4bit", "gemm_4bit_backward", "grouped_gemm_4bit", "grouped_gemm_4bit_backward"),
    *("int8_mixed_scaled_mm", "int8_linear_backward"),
)
"""What a backend may leave to torch's f32 matmul, whose order of summation is nobody's promise."""

IN_AN_ORDER_OF_THEIR_OWN = ("cpu", "cpu-sim")
"""The backends that do not, and whose sums of products therefore have the same bits, too."""


@dataclass
class _Recorder(Context):
    """Keeps what the primitives gave."""

    results: list[Tensor] = field(default_factory=list)

    def call(self, primitive: Primitive, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = super().call(primitive, *arguments)
        self.results += outputs
        return outputs

    def update(self, primitive: Primitive, *arguments: Any) -> dict[str, Tensor | None]:
        after = super().update(primitive, *arguments)
        self.results += [tensor for tensor in after.values() if tensor is not None]
        return after


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _results(context: Context, check: Callable[[Context], None], threads: int) -> list[Tensor]:
    """What the primitives gave in a check, which must pass."""
    recorder = _Recorder(context.backend, context.device, context.seed, context.served, context.digest)
    with _threads(threads):
        check(recorder)
    return recorder.results


def _check(context: Context, primitive: str, check: Callable[[Context], None]) -> None:
    own_order = context.backend in IN_AN_ORDER_OF_THEIR_OWN
    of_a_gpu = not own_order and registry.backends()[context.backend].by_name_only
    if of_a_gpu or context.device.type != "cpu":
        raise Skip("torch's threads are the CPU's, and these kernels are a GPU's")
    one, two = (_results(context, check, threads) for threads in (1, 2))
    if primitive in SUMS_OF_PRODUCTS and not own_order:
        return  # within the bound of the contract, both of them
    for index, (expected, got) in enumerate(zip(one, two, strict=True)):
        same_bits(f"result {index} with two threads, beside that with one", got, expected)


def _chosen() -> Iterator[Case]:
    for file, wanted in CHOSEN:
        traits = {**PLAIN, **wanted}
        for case in file.cases():
            if "shape" in case.traits and all(case.traits.get(name, few[0]) in few for name, few in traits.items()):
                yield case


def cases() -> Iterator[Case]:
    for case in _chosen():
        run = partial(_check, primitive=case.primitive, check=case.run)
        yield Case(case.primitive, f"threads,{case.name}", run, {**case.traits, "threads": "1 and 2"})


REQUIRED = {primitive: {"threads": ("1 and 2",)} for file, _ in CHOSEN for primitive in file.REQUIRED}
