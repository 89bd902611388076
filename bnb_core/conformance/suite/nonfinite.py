"""Sections 2 to 5: an input that is not finite touches the outputs that are made of it, and no bit of any other.

What a kernel reads beside its row (the end of a vector, a padded tile, the scales of the next block) must not reach a
result, not even multiplied by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as product_of
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance.case import Case, Context, Failure, snapshot
from bnb_core.conformance.values import DTYPES, dtype_name
from bnb_core.primitive import Primitive
from bnb_core.primitives import NESTED_BLOCKSIZE, block_count

NAN, INF = math.nan, math.inf


class Touch(NamedTuple):
    """One element of an argument is set to ``value``: which elements of each output may change?

    ``touched`` has a mask for each output, of its shape. Where ``spreads``, all of these must cease to be finite.
    """

    what: str
    argument: int
    element: int
    value: float
    touched: Sequence[Tensor]
    spreads: bool = True


@dataclass(frozen=True)
class Call:
    """A call, and what is done to it."""

    run: Callable[[Context, Sequence[Any]], Sequence[Tensor]]
    arguments: tuple[Any, ...]
    touches: tuple[Touch, ...]


def _outputs(primitive: Primitive) -> Callable[[Context, Sequence[Any]], Sequence[Tensor]]:
    return lambda context, arguments: context.call(primitive, *arguments)


def _check(context: Context, build: Callable[[torch.Generator], Call], name: str) -> None:
    call = build(context.generator(name))
    clean = call.run(context, call.arguments)
    for touch in call.touches:
        arguments = list(call.arguments)
        spoiled = arguments[touch.argument].clone()
        spoiled.view(-1)[touch.element] = touch.value
        arguments[touch.argument] = spoiled
        for index, (before, after) in enumerate(zip(clean, call.run(context, arguments), strict=True)):
            _check_output(f"{touch.what} of {touch.value}, output {index}", before, after, touch, touch.touched[index])


def _check_output(what: str, before: Tensor, after: Tensor, touch: Touch, touched: Tensor) -> None:
    touched = touched.expand(after.shape)
    if snapshot(before[~touched]) != snapshot(after[~touched]):
        raise Failure(f"{what}: an element changed that does not depend on it")
    if touch.spreads and after.is_floating_point() and bool(after[touched].isfinite().any()):
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


class Weight(NamedTuple):
    """A packed weight [N, K], its scales, and which elements depend on each of them."""

    packed: Tensor
    absmax: Tensor
    nested: tuple[Any, ...]
    touches: list[tuple[str, int, Tensor]]
    """``absmax`` or ``nested_absmax``, the element of it, the mask [N, K]."""


def _weight(N: int, K: int, blocksize: int, nested: bool, generator: torch.Generator) -> Weight:
    blocks = block_count(N * K, blocksize)
    packed = torch.randint(0, 256, (block_count(N * K, 2),), generator=generator, dtype=torch.uint8)
    if not nested:
        absmax = torch.rand(blocks, generator=generator) + 0.5
        chosen = sorted({i * (blocks - 1) // 6 for i in range(7)})
        touches = [("absmax", b, _block(N * K, blocksize, b).view(N, K)) for b in chosen]
        return Weight(packed, absmax, primitives.F32_SCALES, touches)
    absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    nested_absmax = torch.rand(block_count(blocks, NESTED_BLOCKSIZE), generator=generator) + 0.5
    of_block = _block(N * K, blocksize * NESTED_BLOCKSIZE, len(nested_absmax) - 1).view(N, K)
    tensors = (nested_absmax, create_dynamic_map(), torch.tensor(0.75))
    return Weight(packed, absmax, (*tensors, NESTED_BLOCKSIZE), [("nested_absmax", len(nested_absmax) - 1, of_block)])


def _gemm_4bit(
    generator: torch.Generator, product: tuple[int, int, int, int], dtype: torch.dtype, nested: bool
) -> Call:
    M, N, K, blocksize = product
    weight = _weight(N, K, blocksize, nested, generator)
    A = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype)
    arguments = (A, weight.packed, (N, K), weight.absmax, blocksize, "nf4", bias, *weight.nested)
    places = {"absmax": 3, "nested_absmax": 7}
    row = M // 2
    touches = [
        Touch("an element of A", 0, row * K + K - 1, INF, [_one((M, 1), row)]),
        Touch("an element of the bias", 6, N - 1, NAN, [_one((N,), N - 1)]),
        *(Touch(name, places[name], i, NAN, [mask.any(dim=1)]) for name, i, mask in weight.touches),
    ]
    return Call(_outputs(primitives.gemm_4bit), arguments, tuple(touches))


def _gemm_4bit_backward(
    generator: torch.Generator, product: tuple[int, int, int, int], dtype: torch.dtype, nested: bool
) -> Call:
    M, N, K, blocksize = product
    weight = _weight(N, K, blocksize, nested, generator)
    dY = torch.randn(M, N, generator=generator).to(dtype)
    arguments = (dY, weight.packed, (N, K), weight.absmax, blocksize, "nf4", *weight.nested)
    places = {"absmax": 3, "nested_absmax": 6}
    row = M // 2
    touches = [
        Touch("an element of dY", 0, row * N + N - 1, INF, [_one((M, 1), row)]),
        *(Touch(name, places[name], i, NAN, [mask.any(dim=0)]) for name, i, mask in weight.touches),
    ]
    return Call(_outputs(primitives.gemm_4bit_backward), arguments, tuple(touches))


def _quantize(generator: torch.Generator, n: int, blocksize: int, dtype: torch.dtype, bits: int) -> Call:
    A = torch.randn(n, generator=generator).to(dtype)
    blocks = block_count(n, blocksize)
    touches = []
    for block, value in ((0, NAN), (blocks // 2, INF), (blocks - 1, -INF)):
        codes = _block(n, blocksize, block)
        if bits == 4:
            codes = torch.nn.functional.pad(codes, (0, n % 2)).view(-1, 2).any(dim=1)[:, None]
        touches.append(
            Touch("an element", 0, min(n, (block + 1) * blocksize) - 1, value, [codes, _one((blocks,), block)])
        )
    if bits == 4:
        return Call(_outputs(primitives.quantize_4bit), (A, blocksize, "nf4", torch.uint8), tuple(touches))
    return Call(_outputs(primitives.quantize_blockwise), (A, create_dynamic_map(), blocksize), tuple(touches))


def _dequantize(generator: torch.Generator, n: int, blocksize: int, dtype: torch.dtype, bits: int) -> Call:
    blocks = block_count(n, blocksize)
    codes = torch.randint(0, 256, (block_count(n * bits, 8),), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(blocks, generator=generator)
    touches = tuple(
        Touch("absmax", 1, block, NAN, [_block(n, blocksize, block)]) for block in {0, blocks // 2, blocks - 1}
    )
    if bits == 8:
        arguments: tuple[Any, ...] = (codes, absmax, create_dynamic_map(), blocksize, dtype)
        return Call(_outputs(primitives.dequantize_blockwise), arguments, touches)
    arguments = (codes, absmax, blocksize, "nf4", (n,), dtype, *primitives.F32_SCALES)
    return Call(_outputs(primitives.dequantize_4bit), arguments, touches)


INT8_SHAPES = ((1, 9, 33), (3, 17, 64), (5, 33, 100), (20, 24, 136), (70, 40, 31))
"""(rows, N, K)"""


def _int8_quant(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype, threshold: float) -> Call:
    """A NaN is no outlier and takes its row's scale with it; so does an infinity where there are no outliers."""
    M, _, K = shape
    A = torch.randn(M, K, generator=generator).clamp(-2, 2).to(dtype)
    row, column = M // 2, K - 1
    in_row, in_column = _one((M, 1), row), _one((K,), column)
    nothing = torch.zeros(1, dtype=torch.bool)
    mask = nothing if threshold > 0 else torch.zeros(0, dtype=torch.bool)
    touched = [in_row, in_column, _one((M,), row), in_column, mask]
    touch = Touch("an element", 0, row * K + column, NAN, touched)
    touches = [touch] if threshold > 0 else [touch, touch._replace(value=INF)]
    return Call(_outputs(primitives.int8_double_quant), (A, threshold), tuple(touches))


def _int8_rows(call: Call) -> Call:
    """What int8_vectorwise_quant gives of :func:`_int8_quant`: codes and scales by row, the mask."""
    touches = tuple(touch._replace(touched=[touch.touched[i] for i in (0, 2, 4)]) for touch in call.touches)
    return Call(_outputs(primitives.int8_vectorwise_quant), call.arguments, touches)


def _int8_dequant(generator: torch.Generator, shape: tuple[int, int, int]) -> Call:
    M, _, K = shape
    q = torch.randint(-127, 128, (M, K), generator=generator, dtype=torch.int8)
    touch = Touch("a row's scale", 1, M // 2, NAN, [_one((M, 1), M // 2)])
    return Call(_outputs(primitives.int8_vectorwise_dequant), (q, torch.rand(M, generator=generator)), (touch,))


def _int8_scales(M: int, N: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    row_stats, col_stats = torch.rand(M, generator=generator) + 0.1, torch.rand(N, generator=generator) + 0.1
    return row_stats, col_stats, torch.randn(N, generator=generator).to(dtype)


def _scale_touches(M: int, N: int, row_stats: int, col_stats: int, bias: int) -> tuple[Touch, ...]:
    """Of the arguments at these places."""
    return (
        Touch("a row's scale", row_stats, M - 1, NAN, [_one((M, 1), M - 1)]),
        Touch("a column's scale", col_stats, N // 2, NAN, [_one((N,), N // 2)]),
        Touch("an element of the bias", bias, N - 1, INF, [_one((N,), N - 1)]),
    )


def _int8_product(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype, fused: bool) -> Call:
    M, N, K = shape
    row_stats, col_stats, bias = _int8_scales(M, N, dtype, generator)
    if not fused:
        C = torch.randint(-(2**20), 2**20, (M, N), generator=generator, dtype=torch.int32)
        arguments: tuple[Any, ...] = (C, row_stats, col_stats, bias, dtype)
        return Call(_outputs(primitives.int8_mm_dequant), arguments, _scale_touches(M, N, 1, 2, 3))
    A, B = (torch.randint(-127, 128, (n, K), generator=generator, dtype=torch.int8) for n in (M, N))
    arguments = (A, B, row_stats, col_stats, bias, dtype)
    return Call(_outputs(primitives.int8_scaled_mm), arguments, _scale_touches(M, N, 2, 3, 4))


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
        *_scale_touches(M, N, 3, 4, 6),
        Touch("an outlier", 0, row * K + K - 1, NAN, [_one((M, 1), row)]),
        Touch("an outlier", 0, row * K, INF, [_one((M, 1), row)]),
        Touch("no outlier", 0, row * K + 1, NAN, [torch.zeros(1, dtype=torch.bool)]),
    )
    arguments = (A, CA, CB, row_stats, col_stats, outliers, bias)
    return Call(_outputs(primitives.int8_mixed_scaled_mm), arguments, touches)


def cases() -> Iterator[Case]:
    for primitive, name, build, traits in _calls():
        yield Case(primitive, name, partial(_check, build=build, name=f"{primitive},{name}"), traits)


def _calls() -> Iterator[tuple[str, str, Callable[[torch.Generator], Call], dict[str, str]]]:
    for dtype in DTYPES:
        traits = {"dtype": dtype_name(dtype)}

        def named(*parts: object, traits: dict[str, str] = traits) -> str:
            return ",".join(["one that is not finite", *map(str, parts), traits["dtype"]])

        for product, nested in product_of(PRODUCTS, (False, True)):
            name = named(*product, "double-quantized" if nested else "f32")
            options: dict[str, Any] = {"product": product, "dtype": dtype, "nested": nested}
            yield "gemm_4bit", name, partial(_gemm_4bit, **options), traits
            yield "gemm_4bit_backward", name, partial(_gemm_4bit_backward, **options), traits
        for n, blocksize in ((1000, 64), (777, 32), (9000, 4096)):
            for bits, suffix in ((8, "blockwise"), (4, "4bit")):
                sizes: dict[str, Any] = {"n": n, "blocksize": blocksize, "dtype": dtype, "bits": bits}
                yield f"quantize_{suffix}", named(n, blocksize), partial(_quantize, **sizes), traits
                yield f"dequantize_{suffix}", named(n, blocksize), partial(_dequantize, **sizes), traits
        for shape in INT8_SHAPES:
            for threshold in (0.0, 3.0):
                quant = partial(_int8_quant, shape=shape, dtype=dtype, threshold=threshold)
                yield "int8_double_quant", named(*shape, threshold), quant, traits
                rows = lambda generator, quant=quant: _int8_rows(quant(generator))  # noqa: E731
                yield "int8_vectorwise_quant", named(*shape, threshold), rows, traits
            for fused, primitive in ((False, "int8_mm_dequant"), (True, "int8_scaled_mm")):
                yield primitive, named(*shape), partial(_int8_product, shape=shape, dtype=dtype, fused=fused), traits
            yield "int8_mixed_scaled_mm", named(*shape), partial(_int8_mixed, shape=shape, dtype=dtype), traits
    for shape in INT8_SHAPES:
        name = ",".join(["one that is not finite", *map(str, shape)])
        yield "int8_vectorwise_dequant", name, partial(_int8_dequant, shape=shape), {"dtype": "float32"}


REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {}
