"""Sections 3 and 4, batches: under batch_invariant() a row has the same bits alone, in a pair and among many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from bnb_core import primitives, registry
from bnb_core.conformance.case import Case, Context, Failure
from bnb_core.conformance.compare import near_product, same_bits
from bnb_core.conformance.suite.gemm_4bit import Sample
from bnb_core.conformance.values import DTYPES, dtype_name
from bnb_core.records import Int8Rows, Int8Weight

ROWS = 34
WEIGHTS = {"K a multiple of 64": (40, 192), "K odd": (40, 67)}
"""(N, K)."""
GROUPED_WEIGHTS = {"K a multiple of 64": (48, 192), "K short": (48, 32)}
GROUPS = (0, 3, 24, 7)
"""Rows of each."""
INT8_SHAPE = (24, 96)
INT8_ROWS = 12
THRESHOLD = 6.0


def _check_parts(whole: Tensor, of_rows: Callable[[list[int]], Tensor]) -> None:
    """``of_rows(rows)`` is the result for some rows, which ``whole`` has for all of them."""
    last = len(whole) - 1
    for rows in ([0], [last], [last, 3], list(range(8, -1, -1))):
        same_bits(f"rows {rows}, beside those of the whole batch,", of_rows(rows), whole[rows])


def _gemm(context: Context, shape: str, dtype: torch.dtype, backward: bool) -> None:
    generator = context.generator(f"batch,{shape},{dtype}")
    N, K = WEIGHTS[shape]
    weight, values = Sample(dtype, nested=True).weight_of((N, K), generator)
    bias = None if backward else torch.randn(N, generator=generator).to(dtype)
    A = torch.randn((ROWS, N if backward else K), generator=generator).to(dtype)

    def product(rows: Tensor) -> Tensor:
        if backward:
            return context.call(primitives.gemm_4bit_backward, rows, weight)[0]
        return context.call(primitives.gemm_4bit, rows, weight, bias)[0]

    with registry.batch_invariant():
        whole = product(A)
        near_product(whole, A, values if backward else values.T, bias)
        _check_parts(whole, lambda rows: product(A[rows]))
        same_bits("rows of three dimensions", product(A[:6].view(2, 3, -1)).view(6, -1), whole[:6])


def _grouped(context: Context, shape: str, dtype: torch.dtype, backward: bool) -> None:
    generator = context.generator(f"batch,grouped,{shape},{dtype}")
    N, K = GROUPED_WEIGHTS[shape]
    weight, values = Sample(dtype).weight_of((len(GROUPS), N, K), generator)
    bias = None if backward else torch.randn((len(GROUPS), N), generator=generator).to(dtype)
    A = torch.randn((ROWS, N if backward else K), generator=generator).to(dtype)
    group = torch.arange(len(GROUPS)).repeat_interleave(torch.tensor(GROUPS))

    def product(rows: list[int]) -> Tensor:
        counts = group[rows].bincount(minlength=len(GROUPS)).tolist()
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        order = group[rows].argsort(stable=True)
        sorted_rows = A[rows][order]
        if backward:
            (result,) = context.call(primitives.grouped_gemm_4bit_backward, sorted_rows, weight, offsets)
        else:
            (result,) = context.call(primitives.grouped_gemm_4bit, sorted_rows, weight, offsets, bias)
        return torch.empty_like(result).index_copy(0, order, result)

    with registry.batch_invariant():
        whole = product(list(range(ROWS)))
        parts = zip(whole.split(GROUPS), A.split(GROUPS), values, strict=True)
        for e, (result, of_group, value) in enumerate(parts):
            near_product(result, of_group, value if backward else value.T, None if bias is None else bias[e])
        _check_parts(whole, product)


def _int8(context: Context, threshold: float, dtype: torch.dtype) -> None:
    """With a threshold rows have outliers in columns of their own, beside each other and in one that all have."""
    generator = context.generator(f"batch,int8,{dtype}")
    N, K = INT8_SHAPE
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    weight = Int8Weight(codes, torch.rand(N, generator=generator) + 0.5)
    bias = torch.randn(N, generator=generator).to(dtype)
    A = torch.randn((INT8_ROWS, K), generator=generator)
    A[torch.arange(INT8_ROWS), torch.randint(0, K, (INT8_ROWS,), generator=generator)] = 20.0
    A[1::2, 5], A[3] = -9.0, A[3].clamp(-3, 3)
    A = A.to(dtype)

    def product(rows: Tensor) -> tuple[Tensor, ...]:
        q, row_stats, mask = context.call(primitives.int8_vectorwise_quant, rows, threshold)
        if threshold == 0:
            return q, context.call(primitives.int8_scaled_mm, Int8Rows(q, row_stats), weight, bias, dtype)[0]
        mixed = context.call(primitives.int8_mixed_scaled_mm, rows, Int8Rows(q, row_stats), weight, mask, bias)
        return q, mixed[0]

    alone = {row: product(A[row : row + 1]) for row in range(0, INT8_ROWS, 4)}
    with registry.batch_invariant():
        whole = product(A)
        for index, result in enumerate(whole):
            _check_parts(result, lambda rows, index=index: product(A[rows])[index])  # type: ignore[misc]
    for row, (q, y) in alone.items():
        same_bits(f"codes of row {row}, beside itself alone and without the mode,", whole[0][row : row + 1], q)
        error = (whole[1][row : row + 1].double() - y.double()).abs()
        if not bool((error <= 2 * torch.finfo(dtype).eps * y.double().abs() + 1e-3).all()):
            raise Failure(f"row {row} is off what it is alone and without the mode by {float(error.max())}")


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = dtype_name(dtype)
        traits = {"dtype": name, "batch": "invariant"}
        for check, shapes, primitive in (
            (_gemm, WEIGHTS, "gemm_4bit"),
            (_grouped, GROUPED_WEIGHTS, "grouped_gemm_4bit"),
        ):
            for shape in shapes:
                run = partial(check, shape=shape, dtype=dtype, backward=False)
                yield Case(primitive, f"batch invariant,{name},{shape}", run, traits)
            # What weights that are stored the other way round are multiplied with in a forward pass.
            run = partial(check, shape=next(iter(shapes)), dtype=dtype, backward=True)
            yield Case(f"{primitive}_backward", f"batch invariant,{name}", run, traits)
        for called, threshold in (("int8_scaled_mm", 0.0), ("int8_mixed_scaled_mm", THRESHOLD)):
            run = partial(_int8, threshold=threshold, dtype=dtype)
            yield Case(called, f"batch invariant,{name}", run, traits)


REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {
    primitive: {"batch": ("invariant",)}
    for primitive in (
        *("gemm_4bit", "gemm_4bit_backward", "grouped_gemm_4bit", "grouped_gemm_4bit_backward"),
        *("int8_scaled_mm", "int8_mixed_scaled_mm"),
    )
}
