"""Section 5: steps whose count and learning rate kernels read from memory have the bits of those with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bnb_core.conformance.case import Case, Context, named
from bnb_core.conformance.compare import same_bits
from bnb_core.conformance.suite.optimizer import OPTIONS, PRIMITIVES, SHAPES, Sample, call_of, in_one, unorm_of
from bnb_core.conformance.values import DTYPES, dtype_name
from bnb_core.primitives import OPTIMIZERS
from bnb_core.records import OptimizerStep, map_tensors

COUNTS = {1: 0.01, 2: 1 / 3, 7: 0.02, 1000: 0.0, 2**24 + 1: 0.01, 2**40 + 3: 1e-4}
"""Steps, the last ones such as f32 does not hold, and their learning rates."""
IN_MEMORY = ("count", "learning rate", "both")


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _in_memory(step: OptimizerStep, what: str) -> OptimizerStep:
    """The same step with some of its numbers in tensors, in their places others that would be wrong."""
    if what != "learning rate":
        step = step._replace(step=5, step_tensor=_number(step.step))
    return step if what == "count" else step._replace(lr=123.0, lr_tensor=_number(step.lr))


def _same(context: Context, sample: Sample, bits: int, what: str) -> None:
    step, *others = call_of(sample, bits, context.generator(f"in memory,{sample.name}"))
    others[-1] = unorm_of(sample)
    for count, lr in COUNTS.items():
        at = step._replace(step=count, lr=lr)
        expected = context.update(PRIMITIVES[bits], at, *others)
        got = context.update(PRIMITIVES[bits], _in_memory(at, what), *others)
        for name, wanted in expected.items():
            if isinstance(wanted, Tensor):
                same_bits(f"{name} of step {count}, learning rate {lr}", got[name], wanted)  # type: ignore[arg-type]


def _several(context: Context, optimizer: str, dtype: torch.dtype, bits: int) -> None:
    """Parameters of all shapes in one call, each with a count of its own."""
    primitive, lr = PRIMITIVES[bits], _number(0.02)
    samples = [Sample(optimizer, dtype, shape) for shape in (*SHAPES, *SHAPES)]
    calls = [call_of(sample, bits, context.generator(f"several,{sample.name}")) for sample in samples]
    for_each: list[Any] = []
    together: list[Any] = []
    for count, (step, *others) in enumerate(calls, start=1):
        for form, counted in (
            (for_each, step._replace(step=count, lr=0.02)),
            (together, step._replace(step_tensor=_number(count), lr_tensor=lr)),
        ):
            form.append(map_tensors(lambda t: t.to(context.device).clone(), (counted, *others)))
    for call in for_each:
        primitive(*call)
    primitive.several(*in_one(primitive, together))
    for sample, one, other in zip(samples, for_each, together, strict=True):
        got: dict[str, Any] = named(primitive, other)
        for name, expected in named(primitive, one).items():
            if isinstance(expected, Tensor):
                same_bits(f"{name} of {sample.shape}", got[name], expected)


def cases() -> Iterator[Case]:
    for (bits, primitive), optimizer in product(PRIMITIVES.items(), OPTIMIZERS):
        for option, what in [*product(OPTIONS, ("both",)), ("plain", "count"), ("plain", "learning rate")]:
            if option.startswith("schedules") and not OPTIMIZERS[optimizer].stacked:
                continue
            sample = Sample(optimizer, torch.float32, option=option, gradient="some zero")
            same = partial(_same, sample=sample, bits=bits, what=what)
            yield Case(primitive.name, f"in memory,{what},{optimizer},{option}", same, {"in memory": what})
        for dtype in DTYPES:
            several = partial(_several, optimizer=optimizer, dtype=dtype, bits=bits)
            name = f"in memory,several,{optimizer},{dtype_name(dtype)}"
            yield Case(primitive.name, name, several, {"dtype": dtype_name(dtype), "in memory": "several"})


_REQUIRED = {"in memory": (*IN_MEMORY, "several")}
REQUIRED = {primitive.name: _REQUIRED for primitive in PRIMITIVES.values()}
