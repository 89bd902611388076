"""Sections 2 to 5: an input that is not finite touches the outputs that are made of it, and no bit of any other.

What a kernel reads beside its row (the end of a vector, a padded tile, the scales of the next block) must not reach a
result, not even multiplied by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from itertools import product as product_of
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance.case import Case, Context, Failure, named, positional, snapshot
from bnb_core.conformance.values import DTYPES, dtype_name
from bnb_core.primitive import Primitive
from bnb_core.primitives import block_count
from bnb_core.records import NESTED_BLOCKSIZE, Int8Rows, Int8Weight, Weight4bit

NAN, INF = math.nan, math.inf


class Touch(NamedTuple):
    """One element of an argument is set to ``value``: which elements of each output may change?

    ``touched`` has a mask for each output, of its shape. All of these must cease to be finite.
    """

    argument: str
    """By the name that errors call it."""
    element: int
    value: float
    touched: Sequence[Tensor]


@dataclass(frozen=True)
class Call:
    """A call, and what is done to it."""

    primitive: Primitive
    arguments: tuple[Any, ...]
    touches: tuple[Touch, ...]


def _check(context: Context, build: Callable[[torch.Generator], Call], name: str) -> None:
    call = build(context.generator(name))
    clean = context.call(call.primitive, *call.arguments)
    for touch in call.touches:
        arguments = named(call.primitive, call.arguments)
        spoiled = arguments[touch.argument] = arguments[touch.argument].clone()
        spoiled.view(-1)[touch.element] = touch.value
        after = context.call(call.primitive, *positional(call.primitive, arguments))
        for index, outputs in enumerate(zip(clean, after, touch.touched, strict=True)):
            _check_output(f"{touch.value} in {touch.argument}, output {index}", *outputs)


def _check_output(what: str, before: Tensor, after: Tensor, touched: Tensor) -> None:
    touched = touched.expand(after.shape)
    if snapshot(before[~touched]) != snapshot(after[~touched]):
        raise Failure(f"{what}: an element changed that does not depend on it")
    if after.is_floating_point() and bool(after[touched].isfinite().any()):
        raise Failure(f"{what}: an element that depends on it is finite")


def _one(shape: Sequence[int], element: int) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[element] = True
    return mask


def _block(n: int, blocksize: int, block: int) -> Tensor:
    """The elements, of n, that lie in a block."""
    return torch.arange(n) // blocksize == block


# (rows of A, N, K, block size): rows that end within a vector of codes, within a block, within a byte
PRODUCTS = (
    (1, 33, 32, 32),
    (1, 33, 100, 32),
    (2, 9, 8, 64),
    (3, 40, 160, 64),
    (4, 24, 67, 32),
    (5, 33, 100, 64),
    (33, 20, 320, 64),
    (70, 50, 100, 32),
    (130, 67, 192, 64),
)


def _weight(
    N: int, K: int, blocksize: int, nested: bool, generator: torch.Generator
) -> tuple[Weight4bit, list[tuple[str, int, Tensor]]]:
    """A weight, and for some elements of its scales, by their name: which elements depend on each, a mask [N, K]."""
    blocks = block_count(N * K, blocksize)
    packed = torch.randint(0, 256, (block_count(N * K, 2),), generator=generator, dtype=torch.uint8)
    if not nested:
        absmax = torch.rand(blocks, generator=generator) + 0.5
        chosen = sorted({i * (blocks - 1) // 6 for i in range(7)})
        masks = [("absmax", b, _block(N * K, blocksize, b).view(N, K)) for b in chosen]
        return Weight4bit(packed, (N, K), absmax, blocksize, "nf4"), masks
    absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    nested_absmax = torch.rand(block_count(blocks, NESTED_BLOCKSIZE), generator=generator) + 0.5
    of_block = _block(N * K, blocksize * NESTED_BLOCKSIZE, len(nested_absmax) - 1).view(N, K)
    tensors = (nested_absmax, create_dynamic_map(), torch.tensor(0.75))
    weight = Weight4bit(packed, (N, K), absmax, blocksize, "nf4", *tensors)
    return weight, [("nested_absmax", len(nested_absmax) - 1, of_block)]


def _gemm_4bit(
    generator: torch.Generator, product: tuple[int, int, int, int], dtype: torch.dtype, nested: bool
) -> Call:
    M, N, K, blocksize = product
    weight, masks = _weight(N, K, blocksize, nested, generator)
    A = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype)
    row = M // 2
    touches = (
        Touch("A", row * K + K - 1, INF, [_one((M, 1), row)]),
        Touch("bias", N - 1, NAN, [_one((N,), N - 1)]),
        *(Touch(name, element, NAN, [mask.any(dim=1)]) for name, element, mask in masks),
    )
    return Call(primitives.gemm_4bit, (A, weight, bias), touches)


def _gemm_4bit_backward(
    generator: torch.Generator, product: tuple[int, int, int, int], dtype: torch.dtype, nested: bool
) -> Call:
    M, N, K, blocksize = product
    weight, masks = _weight(N, K, blocksize, nested, generator)
    dY = torch.randn(M, N, generator=generator).to(dtype)
    row = M // 2
    touches = (
        Touch("dY", row * N + N - 1, INF, [_one((M, 1), row)]),
        *(Touch(name, element, NAN, [mask.any(dim=0)]) for name, element, mask in masks),
    )
    return Call(primitives.gemm_4bit_backward, (dY, weight), touches)


GROUPS = (1, 0, 3)
"""Rows of each group."""

GROUPED_PRODUCTS = [(M, N, K, blocksize) for M, N, K, blocksize in PRODUCTS if (N, K) == (40, 160)]


def _grouped(
    generator: torch.Generator, product: tuple[int, int, int, int], dtype: torch.dtype, nested: bool, backward: bool
) -> Call:
    """A weight of a group touches the rows of that group; the one of a group without rows, nothing."""
    _, N, K, blocksize = product
    E, rows = len(GROUPS), torch.arange(len(GROUPS)).repeat_interleave(torch.tensor(GROUPS))
    stack, masks = _weight(E * N, K, blocksize, nested, generator)
    weights = stack._replace(shape=(E, N, K))
    columns = N if backward else K
    A = torch.randn(len(rows), columns, generator=generator).to(dtype)
    offsets = torch.tensor([0, *accumulate(GROUPS)], dtype=torch.int32)
    of_group = [(name, element, mask.view(E, N, K).any(dim=1 if backward else 2)) for name, element, mask in masks]
    touches = (
        Touch("dY" if backward else "A", columns - 1, INF, [_one((len(rows), 1), 0)]),
        *(Touch(name, element, NAN, [outputs[rows]]) for name, element, outputs in of_group),
    )
    if backward:
        return Call(primitives.grouped_gemm_4bit_backward, (A, weights, offsets), touches)
    bias = torch.randn(E, N, generator=generator).to(dtype)
    return Call(primitives.grouped_gemm_4bit, (A, weights, offsets, bias), touches)


def _quantize(generator: torch.Generator, n: int, blocksize: int, dtype: torch.dtype, bits: int) -> Call:
    A = torch.randn(n, generator=generator).to(dtype)
    blocks = block_count(n, blocksize)
    touches = []
    for block, value in ((0, NAN), (blocks // 2, INF), (blocks - 1, -INF)):
        codes = _block(n, blocksize, block)
        if bits == 4:
            codes = torch.nn.functional.pad(codes, (0, n % 2)).view(-1, 2).any(dim=1)[:, None]
        touches.append(Touch("A", min(n, (block + 1) * blocksize) - 1, value, [codes, _one((blocks,), block)]))
    if bits == 4:
        return Call(primitives.quantize_4bit, (A, blocksize, "nf4", torch.uint8), tuple(touches))
    return Call(primitives.quantize_blockwise, (A, create_dynamic_map(), blocksize), tuple(touches))


def _dequantize(generator: torch.Generator, n: int, blocksize: int, dtype: torch.dtype, bits: int) -> Call:
    blocks = block_count(n, blocksize)
    codes = torch.randint(0, 256, (block_count(n * bits, 8),), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(blocks, generator=generator)
    touches = tuple(
        Touch("absmax", block, NAN, [_block(n, blocksize, block)]) for block in {0, blocks // 2, blocks - 1}
    )
    if bits == 8:
        return Call(primitives.dequantize_blockwise, (codes, absmax, create_dynamic_map(), blocksize, dtype), touches)
    return Call(primitives.dequantize_4bit, (Weight4bit(codes, (n,), absmax, blocksize, "nf4"), dtype), touches)


# (rows, N, K)
INT8_SHAPES = ((1, 9, 33), (3, 17, 64), (5, 33, 100), (20, 24, 136), (70, 40, 31))
INT8_BACKWARD_SHAPES = ((1, 33, 9), (3, 130, 64), (5, 100, 33), (20, 136, 24), (70, 200, 31))


def _int8_quant(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype, threshold: float) -> Call:
    """A NaN is no outlier and takes its row's scale with it; so does an infinity where there are no outliers."""
    M, _, K = shape
    A = torch.randn(M, K, generator=generator).clamp(-2, 2).to(dtype)
    row, column = M // 2, K - 1
    in_row, in_column = _one((M, 1), row), _one((K,), column)
    nothing = torch.zeros(1, dtype=torch.bool)
    mask = nothing if threshold > 0 else torch.zeros(0, dtype=torch.bool)
    touched = [in_row, in_column, _one((M,), row), in_column, mask]
    touch = Touch("A", row * K + column, NAN, touched)
    touches = [touch] if threshold > 0 else [touch, touch._replace(value=INF)]
    return Call(primitives.int8_double_quant, (A, threshold), tuple(touches))


def _int8_rows(call: Call) -> Call:
    """What int8_vectorwise_quant gives of :func:`_int8_quant`: codes and scales by row, the mask."""
    touches = tuple(touch._replace(touched=[touch.touched[i] for i in (0, 2, 4)]) for touch in call.touches)
    return Call(primitives.int8_vectorwise_quant, call.arguments, touches)


def _int8_dequant(generator: torch.Generator, shape: tuple[int, int, int]) -> Call:
    M, _, K = shape
    q = torch.randint(-127, 128, (M, K), generator=generator, dtype=torch.int8)
    touch = Touch("stats", M // 2, NAN, [_one((M, 1), M // 2)])
    return Call(primitives.int8_vectorwise_dequant, (q, torch.rand(M, generator=generator)), (touch,))


def _int8_scales(M: int, N: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    row_stats, col_stats = torch.rand(M, generator=generator) + 0.1, torch.rand(N, generator=generator) + 0.1
    return row_stats, col_stats, torch.randn(N, generator=generator).to(dtype)


def _scale_touches(M: int, N: int) -> tuple[Touch, ...]:
    return (
        Touch("row_stats", M - 1, NAN, [_one((M, 1), M - 1)]),
        Touch("col_stats", N // 2, NAN, [_one((N,), N // 2)]),
        Touch("bias", N - 1, INF, [_one((N,), N - 1)]),
    )


def _int8_product(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype, fused: bool) -> Call:
    M, N, K = shape
    row_stats, col_stats, bias = _int8_scales(M, N, dtype, generator)
    if not fused:
        C = torch.randint(-(2**20), 2**20, (M, N), generator=generator, dtype=torch.int32)
        return Call(primitives.int8_mm_dequant, (C, row_stats, col_stats, bias, dtype), _scale_touches(M, N))
    A, B = (torch.randint(-127, 128, (n, K), generator=generator, dtype=torch.int8) for n in (M, N))
    return Call(
        primitives.int8_scaled_mm,
        (Int8Rows(A, row_stats), Int8Weight(B, col_stats), bias, dtype),
        _scale_touches(M, N),
    )


def _int8_mixed(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype) -> Call:
    """Of A only the outlier columns are read."""
    M, N, K = shape
    row_stats, col_stats, bias = _int8_scales(M, N, dtype, generator)
    outliers = torch.zeros(K, dtype=torch.bool)
    outliers[[0, K // 2, K - 1]] = True
    A = (torch.randn(M, K, generator=generator) * 10).to(dtype)
    CA, CB = (torch.randint(-127, 128, (n, K), generator=generator, dtype=torch.int8) for n in (M, N))
    CA = CA.masked_fill(outliers, 0)
    row = M // 2
    touches = (
        *_scale_touches(M, N),
        Touch("A", row * K + K - 1, NAN, [_one((M, 1), row)]),
        Touch("A", row * K, INF, [_one((M, 1), row)]),
        Touch("A", row * K + 1, NAN, [torch.zeros(1, dtype=torch.bool)]),
    )
    arguments = (A, Int8Rows(CA, row_stats), Int8Weight(CB, col_stats), outliers, bias)
    return Call(primitives.int8_mixed_scaled_mm, arguments, touches)


def _int8_backward(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype) -> Call:
    """A row of the weight is in every sum, and so is its scale."""
    M, N, K = shape
    dY, col_stats = torch.randn(M, N, generator=generator).to(dtype), torch.rand(N, generator=generator) + 0.1
    B = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    row = M // 2
    touches = (
        Touch("dY", row * N + N - 1, INF, [_one((M, 1), row)]),
        Touch("col_stats", N - 1, NAN, [torch.ones(1, dtype=torch.bool)]),
    )
    return Call(primitives.int8_linear_backward, (dY, Int8Weight(B, col_stats)), touches)


def cases() -> Iterator[Case]:
    for primitive, name, build, traits in _calls():
        yield Case(primitive, name, partial(_check, build=build, name=f"{primitive},{name}"), traits)


def _calls() -> Iterator[tuple[str, str, Callable[[torch.Generator], Call], dict[str, str]]]:
    for dtype in DTYPES:
        traits = {"dtype": dtype_name(dtype)}

        def title(*parts: object, traits: dict[str, str] = traits) -> str:
            return ",".join(["one that is not finite", *map(str, parts), traits["dtype"]])

        for product, nested in product_of(PRODUCTS, (False, True)):
            name = title(*product, "double-quantized" if nested else "f32")
            options: dict[str, Any] = {"product": product, "dtype": dtype, "nested": nested}
            yield "gemm_4bit", name, partial(_gemm_4bit, **options), traits
            yield "gemm_4bit_backward", name, partial(_gemm_4bit_backward, **options), traits
            if product in GROUPED_PRODUCTS:
                for backward, suffix in ((False, ""), (True, "_backward")):
                    grouped = partial(_grouped, **options, backward=backward)
                    yield f"grouped_gemm_4bit{suffix}", name, grouped, traits
        for n, blocksize in ((1000, 64), (777, 32), (9000, 4096)):
            for bits, suffix in ((8, "blockwise"), (4, "4bit")):
                sizes: dict[str, Any] = {"n": n, "blocksize": blocksize, "dtype": dtype, "bits": bits}
                yield f"quantize_{suffix}", title(n, blocksize), partial(_quantize, **sizes), traits
                yield f"dequantize_{suffix}", title(n, blocksize), partial(_dequantize, **sizes), traits
        for shape in INT8_SHAPES:
            for threshold in (0.0, 3.0):
                quant = partial(_int8_quant, shape=shape, dtype=dtype, threshold=threshold)
                yield "int8_double_quant", title(*shape, threshold), quant, traits
                rows = lambda generator, quant=quant: _int8_rows(quant(generator))  # noqa: E731
                yield "int8_vectorwise_quant", title(*shape, threshold), rows, traits
            for fused, primitive in ((False, "int8_mm_dequant"), (True, "int8_scaled_mm")):
                yield primitive, title(*shape), partial(_int8_product, shape=shape, dtype=dtype, fused=fused), traits
            yield "int8_mixed_scaled_mm", title(*shape), partial(_int8_mixed, shape=shape, dtype=dtype), traits
        for shape in INT8_BACKWARD_SHAPES:
            yield "int8_linear_backward", title(*shape), partial(_int8_backward, shape=shape, dtype=dtype), traits
    for shape in INT8_SHAPES:
        name = ",".join(["one that is not finite", *map(str, shape)])
        yield "int8_vectorwise_dequant", name, partial(_int8_dequant, shape=shape), {"dtype": "float32"}


REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {}
