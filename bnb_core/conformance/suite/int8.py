"""Section 4: LLM.int8(). Codes, integers and scales are the same bits everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product as product_of

import numpy as np
import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.conformance import oracle
from bnb_core.conformance.case import Case, Context
from bnb_core.conformance.compare import ROUNDOFF, SUBNORMAL_ROUNDOFF, near_product, same_bits, within
from bnb_core.conformance.precision import LESS_EXACT, check_less_exact
from bnb_core.conformance.values import (
    DTYPES,
    LAYOUTS,
    VALUES,
    contiguous_copy,
    dtype_name,
    rows,
    unit_of_scales,
)
from bnb_core.records import Int8Rows, Int8Weight

MORE_THAN_A_SHARE = "more than a thread's share"
"""A shape for which a CPU wakes a second thread. It is large, and slow in an interpreter."""

ACTIVATION_SHAPES: dict[str, tuple[int, ...]] = {
    "one": (1, 1),
    "vector": (40,),
    "row": (1, 130),
    "matrix": (7, 64),
    "odd": (5, 33),
    "tall": (70, 9),
    "3-D": (2, 3, 50),
    "4-D": (2, 2, 3, 17),
    "no rows": (0, 16),
    "no columns": (3, 0),
    MORE_THAN_A_SHARE: (80, 1000),
}
THRESHOLDS = (0.0, 3.0)

# (batch dimensions of A, N, K)
PRODUCT_SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "one": ((1,), 1, 1),
    "vector": ((), 5, 64),
    "one row": ((1,), 70, 256),
    "matrix": ((16,), 48, 128),
    "odd": ((5,), 33, 67),
    "below a vector": ((3,), 7, 5),
    "many rows": ((130,), 40, 96),
    "many rows, K a multiple of 64": ((70,), 75, 192),
    "3-D": ((2, 3), 20, 64),
    "no rows": ((0,), 8, 32),
    "K long": ((2,), 3, 65536),
    MORE_THAN_A_SHARE: ((130,), 200, 256),
}

# (batch dimensions of dY, N, K)
BACKWARD_SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "one": ((1,), 1, 1),
    "vector": ((), 160, 24),
    "one row": ((1,), 200, 70),
    "one row, fewer than 128 terms": ((1,), 33, 130),
    "5 rows": ((5,), 133, 67),
    "many rows": ((70,), 192, 96),
    "many rows, odd": ((130,), 139, 33),
    "many rows, fewer than 128 terms": ((70,), 75, 64),
    "3-D": ((2, 3), 144, 40),
    "no rows": ((0,), 16, 32),
    "N of 0": ((3,), 0, 64),
    "K of 0": ((3,), 8, 0),
    "N long": ((2,), 8200, 9),
    "260 rows": ((260,), 300, 576),
}
BACKWARD_VALUES = ("normal", "cancelling", "large", "zero rows", "small scales", "extreme", "nan row", "inf row")


@dataclass(frozen=True)
class Activations:
    """One tensor to quantize, by its classes."""

    dtype: torch.dtype
    shape: str = "matrix"
    threshold: float = 0.0
    values: str = "normal"
    layout: str = "contiguous"

    @property
    def traits(self) -> dict[str, str]:
        return {
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "threshold": str(self.threshold),
            "values": self.values,
            "layout": self.layout,
        }

    @property
    def name(self) -> str:
        return ",".join(self.traits.values())

    def tensor(self, context: Context) -> Tensor:
        size = ACTIVATION_SHAPES[self.shape]
        n = torch.Size(size).numel()
        return LAYOUTS[self.layout](VALUES[self.values](n, self.dtype, context.generator(self.name)).view(size))


def _rows(A: Tensor) -> oracle.F32:
    return A.float().contiguous().resolve_neg().view(A.shape[:-1].numel(), A.shape[-1]).numpy()


def _check_row_results(A: Tensor, q: Tensor, row_stats: Tensor, mask: Tensor, threshold: float) -> None:
    with np.errstate(all="ignore"):
        expected = oracle.int8_rows(_rows(A), threshold)
    same_bits("codes", q, torch.from_numpy(expected.q).view(A.shape))
    same_bits("row_stats", row_stats, expected.stats)
    same_bits("outlier_mask", mask, torch.from_numpy(expected.outlier_columns) if threshold > 0 else mask[:0])


def _check_vectorwise_quant(context: Context, sample: Activations) -> None:
    A = sample.tensor(context)
    q, row_stats, mask = context.call(primitives.int8_vectorwise_quant, A, sample.threshold)
    _check_row_results(A, q, row_stats, mask, sample.threshold)


def _check_double_quant(context: Context, sample: Activations) -> None:
    A = sample.tensor(context)
    q_row, q_col, row_stats, col_stats, mask = context.call(primitives.int8_double_quant, A, sample.threshold)
    _check_row_results(A, q_row, row_stats, mask, sample.threshold)
    with np.errstate(all="ignore"):
        expected = oracle.int8_columns(_rows(A), sample.threshold)
    same_bits("codes by column", q_col, torch.from_numpy(np.ascontiguousarray(expected.q)).view(A.shape))
    same_bits("col_stats", col_stats, expected.stats)


def _check_vectorwise_dequant(context: Context, shape: str, layout: str) -> None:
    size, generator = ACTIVATION_SHAPES[shape], context.generator(f"dequant,{shape},{layout}")
    q = torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
    stats = torch.rand(q.shape[:-1].numel(), generator=generator) * 5
    (got,) = context.call(primitives.int8_vectorwise_dequant, LAYOUTS[layout](q), stats)
    expected = q.view(stats.numel(), q.shape[-1]).numpy().astype(np.float64) * stats.double().numpy()[:, None] / 127
    bound = np.abs(expected) * 2.0**-22
    within("values", got.view(expected.shape).numpy(), expected, bound)


@dataclass(frozen=True)
class Product:
    """One int8 product with its scales, by its classes."""

    dtype: torch.dtype
    shape: str = "odd"
    bias: bool = True
    layout: str = "contiguous"
    values: str = "random"

    @property
    def traits(self) -> dict[str, str]:
        return {
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "bias": "bias" if self.bias else "no bias",
            "layout": self.layout,
            "values": self.values,
        }

    @property
    def name(self) -> str:
        return ",".join(self.traits.values())

    def operands(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A [..., K] and B [N, K]; "extreme": every product is the largest there is."""
        batch, N, K = PRODUCT_SHAPES[self.shape]
        if self.values == "extreme":
            A, B = torch.full((*batch, K), -128, dtype=torch.int8), torch.full((N, K), 127, dtype=torch.int8)
        else:
            A = torch.randint(-128, 128, (*batch, K), generator=generator, dtype=torch.int8)
            B = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        return LAYOUTS[self.layout](A), LAYOUTS[self.layout](B)

    def scales(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """row_stats, col_stats and bias."""
        batch, N, _ = PRODUCT_SHAPES[self.shape]
        row_stats = torch.rand(torch.Size(batch).numel(), generator=generator) * 4
        col_stats = torch.rand(N, generator=generator) * 0.3
        bias = torch.randn(N, generator=generator).to(self.dtype) if self.bias else None
        return row_stats, col_stats, bias


def _exact(A: Tensor, B: Tensor) -> Tensor:
    rows = A.long().view(A.shape[:-1].numel(), A.shape[-1])
    return (rows @ B.long().t()).to(torch.int32).view(*A.shape[:-1], B.shape[0])


def _check_matmul(context: Context, sample: Product) -> None:
    A, B = sample.operands(context.generator(sample.name))
    (got,) = context.call(primitives.int8_linear_matmul, A, B)
    same_bits("result", got, _exact(A.contiguous(), B))


def _scaled(C: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None) -> oracle.F64:
    scale = row_stats.double().view(*C.shape[:-1], 1) * col_stats.double() / (127.0 * 127.0)
    result = C.double() * scale
    return (result if bias is None else result + bias.double()).numpy()


def _rounding_bound(dtype: torch.dtype, terms: oracle.F64, expected: oracle.F64) -> oracle.F64:
    """A few f32 roundings of each term, and one to the dtype."""
    return 2.0**-21 * (terms + np.abs(expected)) + ROUNDOFF[dtype] * np.abs(expected) + SUBNORMAL_ROUNDOFF[dtype]


def _check_mm_dequant(context: Context, sample: Product) -> None:
    generator = context.generator(sample.name)
    A, B = sample.operands(generator)
    C, (row_stats, col_stats, bias) = _exact(A.contiguous(), B), sample.scales(generator)
    given = LAYOUTS[sample.layout](C)
    (got,) = context.call(primitives.int8_mm_dequant, given, row_stats, col_stats, bias, sample.dtype)
    expected, terms = _scaled(C, row_stats, col_stats, bias), np.abs(_scaled(C, row_stats, col_stats, None))
    within("result", got.double().numpy(), expected, _rounding_bound(sample.dtype, terms, expected))


def _check_scaled_mm(context: Context, sample: Product) -> None:
    generator = context.generator(sample.name)
    (A, B), (row_stats, col_stats, bias) = sample.operands(generator), sample.scales(generator)
    (got,) = context.call(
        primitives.int8_scaled_mm, Int8Rows(A, row_stats), Int8Weight(B, col_stats), bias, sample.dtype
    )
    C = _exact(A.contiguous(), B)
    expected, terms = _scaled(C, row_stats, col_stats, bias), np.abs(_scaled(C, row_stats, col_stats, None))
    within("result", got.double().numpy(), expected, _rounding_bound(sample.dtype, terms, expected))


def _check_mixed_scaled_mm(context: Context, sample: Product, outliers: int, large: float = 1.0) -> None:
    """With ``large`` outliers and small scales, so that an outlier times a code would overflow."""
    batch, _, K = PRODUCT_SHAPES[sample.shape]
    generator = context.generator(f"{sample.name},{outliers}")
    (CA, CB), (row_stats, col_stats, bias) = sample.operands(generator), sample.scales(generator)
    col_stats = col_stats / large**0.125
    mask = torch.zeros(K, dtype=torch.bool)
    mask[torch.randperm(K, generator=generator)[:outliers]] = True
    CA = LAYOUTS[sample.layout](CA.masked_fill(mask, 0))
    A = LAYOUTS[sample.layout]((torch.randn((*batch, K), generator=generator) * (20 * large)).to(sample.dtype))
    others = (Int8Weight(CB, col_stats), mask, bias)
    (got,) = context.call(primitives.int8_mixed_scaled_mm, A, Int8Rows(CA, row_stats), *others)
    C = _exact(CA.contiguous(), CB)
    weight = (CB.double() * col_stats.double()[:, None] / 127)[:, mask].numpy()
    inputs = A.double()[..., mask].numpy()
    expected = _scaled(C, row_stats, col_stats, bias) + inputs @ weight.T
    outlier_terms = np.abs(inputs) @ np.abs(weight).T
    terms = np.abs(_scaled(C, row_stats, col_stats, None)) + outlier_terms
    # The outlier product may round the weight to A's dtype once, as tensor cores need.
    bound = _rounding_bound(sample.dtype, terms, expected) + ROUNDOFF[sample.dtype] * outlier_terms
    within("result", got.double().numpy(), expected, bound)
    if sample.layout != "contiguous":
        quantized = Int8Rows(contiguous_copy(CA), row_stats)
        of_copies = context.call(primitives.int8_mixed_scaled_mm, contiguous_copy(A), quantized, *others)
        same_bits("result for copies", got, *of_copies)


@dataclass(frozen=True)
class Gradient:
    """One gradient of a linear layer's input, by its classes."""

    dtype: torch.dtype
    shape: str
    layout: str = "contiguous"
    values: str = "normal"

    @property
    def traits(self) -> dict[str, str]:
        return {
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "layout": self.layout,
            "values": self.values,
        }

    @property
    def name(self) -> str:
        return ",".join(self.traits.values())

    def operands(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """dY [..., N], B [N, K] and col_stats."""
        batch, N, K = BACKWARD_SHAPES[self.shape]
        dY = rows((*batch, N), self.dtype, self.values, generator)
        B = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        if self.values == "extreme":
            B = torch.where(B < 0, -128, 127).to(torch.int8)
        col_stats = torch.rand(N, generator=generator) * unit_of_scales(self.dtype, self.values)
        if self.values == "zero rows":
            col_stats[::2] = 0.0
        return LAYOUTS[self.layout](dY), LAYOUTS[self.layout](B), LAYOUTS[self.layout](col_stats)


def _check_backward(context: Context, sample: Gradient) -> None:
    dY, B, col_stats = sample.operands(context.generator(sample.name))
    (got,) = context.call(primitives.int8_linear_backward, dY, Int8Weight(B, col_stats))
    weight = B.double() * col_stats.double()[:, None] / 127
    near_product(got, dY, weight.numpy())
    if sample.layout != "contiguous":
        of_weight = Int8Weight(contiguous_copy(B), contiguous_copy(col_stats))
        of_copies = context.call(primitives.int8_linear_backward, contiguous_copy(dY), of_weight)
        same_bits("result for copies", got, *of_copies)


def _activation_samples() -> Iterator[Activations]:
    for dtype in DTYPES:
        for threshold in THRESHOLDS:
            for shape in ACTIVATION_SHAPES:
                yield Activations(dtype, shape, threshold)
            for values in VALUES:
                yield Activations(dtype, "tall", threshold, values)
            for layout in LAYOUTS:
                yield Activations(dtype, "matrix", threshold, "outliers", layout)
                yield Activations(dtype, "3-D", threshold, "outliers", layout)


def _product_samples() -> Iterator[Product]:
    for dtype in DTYPES:
        for shape in PRODUCT_SHAPES:
            for bias in (False, True):
                yield Product(dtype, shape, bias)
        for layout in LAYOUTS:
            yield Product(dtype, layout=layout)
        # Of sizes that vendors' libraries take, at an address that they may not.
        yield Product(dtype, "many rows", layout="misaligned")
        yield Product(dtype, "K long", values="extreme")


def _gradient_samples() -> Iterator[Gradient]:
    for dtype in DTYPES:
        for shape in BACKWARD_SHAPES:
            yield Gradient(dtype, shape)
        for shape, layout in product_of(("5 rows", "3-D", "many rows"), LAYOUTS):
            yield Gradient(dtype, shape, layout)
        for shape, values in product_of(("one row", "many rows", "many rows, fewer than 128 terms"), BACKWARD_VALUES):
            yield Gradient(dtype, shape, values=values)


def cases() -> Iterator[Case]:
    for activations in dict.fromkeys(_activation_samples()):
        run = partial(_check_vectorwise_quant, sample=activations)
        yield Case("int8_vectorwise_quant", activations.name, run, activations.traits)
        run = partial(_check_double_quant, sample=activations)
        yield Case("int8_double_quant", activations.name, run, activations.traits)
    for shape in ACTIVATION_SHAPES:
        for layout in LAYOUTS:
            dequantize = partial(_check_vectorwise_dequant, shape=shape, layout=layout)
            traits = {"dtype": "float32", "shape": shape, "layout": layout}
            yield Case("int8_vectorwise_dequant", f"{shape},{layout}", dequantize, traits)
    for product in dict.fromkeys(_product_samples()):
        for primitive, check in (("int8_mm_dequant", _check_mm_dequant), ("int8_scaled_mm", _check_scaled_mm)):
            yield Case(primitive, product.name, partial(check, sample=product), product.traits)
        if product.dtype == torch.float32 and product.bias:
            traits = {**product.traits, "dtype": "int8"}
            yield Case("int8_linear_matmul", product.name, partial(_check_matmul, sample=product), traits)
        if product.values == "random" and product.shape != "K long":
            for outliers in (3,) if product.shape == MORE_THAN_A_SHARE else (0, 1, 3):
                mixed = partial(_check_mixed_scaled_mm, sample=product, outliers=outliers)
                traits = {**product.traits, "outliers": str(outliers)}
                yield Case("int8_mixed_scaled_mm", f"{product.name},{outliers} outliers", mixed, traits)
    for gradient in dict.fromkeys(_gradient_samples()):
        yield Case("int8_linear_backward", gradient.name, partial(_check_backward, sample=gradient), gradient.traits)
    for dtype, names in product_of(DTYPES, LESS_EXACT):
        gradient = Gradient(dtype, "many rows, odd")
        less_exact = partial(check_less_exact, check=partial(_check_backward, sample=gradient), names=names)
        name = f"less exact matmuls by {names},{gradient.shape},{dtype_name(dtype)}"
        yield Case("int8_linear_backward", name, less_exact, {"dtype": dtype_name(dtype)})
    for dtype, shape in product_of((torch.float32, torch.bfloat16), PRODUCT_SHAPES):
        if shape in ("K long", MORE_THAN_A_SHARE):
            continue
        product = Product(dtype, shape)
        mixed = partial(_check_mixed_scaled_mm, sample=product, outliers=3, large=1e36)
        yield Case("int8_mixed_scaled_mm", f"{product.name},3 large outliers", mixed, product.traits)


_DTYPES = {"dtype": tuple(dtype_name(dtype) for dtype in DTYPES)}
_LAYOUTS = {"layout": tuple(LAYOUTS)}
_ACTIVATIONS = {
    **_DTYPES,
    **_LAYOUTS,
    "shape": tuple(ACTIVATION_SHAPES),
    "threshold": tuple(str(threshold) for threshold in THRESHOLDS),
    "values": tuple(VALUES),
}
_PRODUCTS = {**_LAYOUTS, "shape": tuple(PRODUCT_SHAPES), "values": ("random", "extreme")}
_SCALED = {**_DTYPES, **_PRODUCTS, "bias": ("bias", "no bias")}

REQUIRED = {
    "int8_vectorwise_quant": _ACTIVATIONS,
    "int8_double_quant": _ACTIVATIONS,
    "int8_vectorwise_dequant": {**_LAYOUTS, "shape": tuple(ACTIVATION_SHAPES)},
    "int8_linear_matmul": _PRODUCTS,
    "int8_mm_dequant": _SCALED,
    "int8_scaled_mm": _SCALED,
    "int8_mixed_scaled_mm": {**_DTYPES, **_LAYOUTS, "bias": ("bias", "no bias"), "outliers": ("0", "1", "3")},
    "int8_linear_backward": {**_DTYPES, **_LAYOUTS, "shape": tuple(BACKWARD_SHAPES), "values": BACKWARD_VALUES},
}
