"""Section 3: matmul with a 4-bit weight, within a bound of the f64 result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.checks import BLOCKSIZES, QUANT_STORAGES, QUANT_TYPES
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance import oracle
from bnb_core.conformance.case import Case, Context, Failure
from bnb_core.conformance.compare import near_product, same_bits
from bnb_core.conformance.precision import LESS_EXACT, check_less_exact
from bnb_core.conformance.values import DTYPES, LAYOUTS, contiguous_copy, dtype_name, rows, unit_of_scales
from bnb_core.records import NESTED_BLOCKSIZE, Weight4bit

# (batch dimensions of A, N, K)
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "gemv": ((1,), 96, 256),
    "gemv of a vector": ((), 33, 128),
    "one weight": ((1,), 1, 1),
    "2 rows": ((2,), 64, 192),
    "4 rows": ((4,), 40, 320),
    "5 rows": ((5,), 31, 96),
    "16 rows": ((16,), 70, 256),
    "33 rows": ((33,), 50, 200),
    "130 rows": ((130,), 80, 288),
    "many rows, K a multiple of 64": ((70,), 75, 192),
    "260 rows, K a multiple of 64": ((260,), 139, 576),
    "70 rows, K long": ((70,), 72, 1088),
    "K odd": ((3,), 17, 67),
    "K odd, gemv": ((1,), 18, 131),
    "K odd, 70 rows": ((70,), 19, 65),
    "K no multiple of 64": ((7,), 24, 100),
    "K shorter than a block": ((3,), 65, 8),
    "K below a vector": ((2,), 21, 3),
    "one output": ((9,), 1, 512),
    "N no multiple of 32": ((4,), 47, 64),
    "3-D": ((2, 3), 40, 128),
    "4-D": ((2, 1, 3), 40, 64),
    "no rows": ((0,), 16, 64),
    "no rows in a batch": ((2, 0), 16, 64),
    "N of 0": ((3,), 0, 64),
    "N of 0, 70 rows": ((70,), 0, 128),
    "K of 0": ((3,), 8, 0),
    "K long": ((1,), 8, 8200),
    "7 rows, K long": ((7,), 40, 1600),
    "N long": ((40,), 600, 128),
    "N long, K no multiple of 256": ((70,), 131, 320),
    "N long, K odd": ((3,), 200, 67),
    "4 rows, N and K long": ((4,), 600, 512),
}
USUAL = "nf4"
"""The format of most cases; the others have those of each shape."""


@dataclass(frozen=True)
class Sample:
    """One product, by its classes."""

    dtype: torch.dtype
    shape: str = "K no multiple of 64"
    blocksize: int = 64
    quant_type: str = USUAL
    quant_storage: torch.dtype = torch.uint8
    nested: bool = False
    bias: bool = True
    layout: str = "contiguous"
    values: str = "normal"

    @property
    def traits(self) -> dict[str, str]:
        return {
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "blocksize": str(self.blocksize),
            "quant_type": self.quant_type,
            "quant_storage": dtype_name(self.quant_storage),
            "scales": "double-quantized" if self.nested else "f32",
            "bias": "bias" if self.bias else "no bias",
            "layout": self.layout,
            "values": self.values,
        }

    @property
    def name(self) -> str:
        return ",".join(self.traits.values())

    def weight(self, generator: torch.Generator) -> tuple[Weight4bit, oracle.F64]:
        """A weight [N, K]."""
        return self.weight_of(SHAPES[self.shape][1:], generator)

    def weight_of(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Weight4bit, oracle.F64]:
        """Random codes, none of which depends on a quantizer, and their f32 values as f64."""
        n = math.prod(shape)
        blocks = primitives.block_count(n, self.blocksize)
        stored_bytes = (n + 1) // 2 + -((n + 1) // 2) % self.quant_storage.itemsize
        packed = torch.randint(0, 256, (stored_bytes,), generator=generator, dtype=torch.uint8)
        unit = unit_of_scales(self.dtype, self.values)
        absmax: Tensor = torch.rand(blocks, generator=generator) * (2 * unit)
        if self.values == "zero blocks":
            absmax[::2] = 0.0
        nested: tuple[Any, ...] = ()
        scales = absmax.numpy()
        if self.nested:
            absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
            nested_absmax = torch.rand(primitives.block_count(blocks, NESTED_BLOCKSIZE), generator=generator) * unit
            nested = (nested_absmax, create_dynamic_map(), torch.tensor(0.75 * unit))
            arrays = (tensor.numpy() for tensor in nested)
            scales = oracle.double_quantized_scales(absmax.numpy(), NESTED_BLOCKSIZE, *arrays)
        values = oracle.dequantize_4bit(packed.numpy(), scales, n, self.blocksize, self.quant_type)
        stored = packed.view(self.quant_storage).unsqueeze(1)
        weight = Weight4bit(stored, shape, absmax, self.blocksize, self.quant_type, *nested)
        return weight, values.reshape(shape).astype(np.float64)

    def added(self, generator: torch.Generator) -> Tensor | None:
        """The bias."""
        return torch.randn(SHAPES[self.shape][1], generator=generator).to(self.dtype) if self.bias else None

    def activations(self, generator: torch.Generator) -> Tensor:
        """A [..., K]."""
        batch, _, K = SHAPES[self.shape]
        return LAYOUTS[self.layout](rows((*batch, K), self.dtype, self.values, generator))

    def gradients(self, generator: torch.Generator) -> Tensor:
        """dY [..., N]."""
        batch, N, _ = SHAPES[self.shape]
        return LAYOUTS[self.layout](rows((*batch, N), self.dtype, self.values, generator))


def _check(context: Context, sample: Sample) -> None:
    generator = context.generator(sample.name)
    (weight, values), bias = sample.weight(generator), sample.added(generator)
    A = sample.activations(generator)
    (got,) = context.call(primitives.gemm_4bit, A, weight, bias)
    near_product(got, A, values.T, bias)
    if sample.layout != "contiguous":
        same_bits("result for a copy", got, *context.call(primitives.gemm_4bit, contiguous_copy(A), weight, bias))


def _check_backward(context: Context, sample: Sample) -> None:
    generator = context.generator(sample.name)
    (weight, values), dY = sample.weight(generator), sample.gradients(generator)
    (got,) = context.call(primitives.gemm_4bit_backward, dY, weight)
    near_product(got, dY, values)
    if sample.layout != "contiguous":
        same_bits("result for a copy", got, *context.call(primitives.gemm_4bit_backward, contiguous_copy(dY), weight))


def _expanded_rows(context: Context, dtype: torch.dtype) -> None:
    """A row repeated by expand (stride 0) is that row, each time."""
    sample = Sample(dtype, "5 rows")
    generator = context.generator(f"expanded,{dtype}")
    (weight, _), bias = sample.weight(generator), sample.added(generator)
    row = torch.randn((1, SHAPES["5 rows"][2]), generator=generator).to(dtype)
    (expanded,) = context.call(primitives.gemm_4bit, row.expand(5, -1), weight, bias)
    (copied,) = context.call(primitives.gemm_4bit, row.repeat(5, 1), weight, bias)
    if not torch.equal(expanded, copied):
        raise Failure("an expanded row gave another result than its copies")


VALUES = ("normal", "cancelling", "large", "zero blocks", "small scales", "nan row", "inf row")


def _samples() -> Iterator[Sample]:
    for dtype in DTYPES:
        for shape in SHAPES:
            yield Sample(dtype, shape)
            for quant_type in QUANT_TYPES:
                if quant_type != USUAL:
                    yield Sample(dtype, shape, quant_type=quant_type, nested=True, bias=False)
        for blocksize in BLOCKSIZES:
            for nested in (False, True):
                yield Sample(dtype, "K odd", blocksize, nested=nested)
                yield Sample(dtype, "130 rows", blocksize, nested=nested)
        yield Sample(dtype, "7 rows, K long", max(BLOCKSIZES))  # a block is longer than a row
        for layout in LAYOUTS:
            yield Sample(dtype, "5 rows", layout=layout)
            yield Sample(dtype, "3-D", layout=layout)
            yield Sample(dtype, "130 rows", layout=layout)
        for values in VALUES:
            yield Sample(dtype, "gemv", values=values, bias=False)
            yield Sample(dtype, "33 rows", values=values)
        for shape in ("16 rows", "33 rows", "K odd", "130 rows", "N long, K no multiple of 256"):
            # Without a bias, beside which the products would be nothing.
            yield Sample(dtype, shape, nested=shape == "16 rows", bias=False, values="small scales")
    for storage in QUANT_STORAGES:
        for shape in ("gemv", "33 rows", "K odd", "K odd, gemv"):
            yield Sample(torch.bfloat16, shape, quant_storage=storage, nested=True)


def cases() -> Iterator[Case]:
    for sample in dict.fromkeys(_samples()):
        yield Case("gemm_4bit", sample.name, partial(_check, sample=sample), sample.traits)
    for sample in dict.fromkeys(replace(sample, bias=False) for sample in _samples()):
        traits = {key: value for key, value in sample.traits.items() if key != "bias"}
        yield Case("gemm_4bit_backward", ",".join(traits.values()), partial(_check_backward, sample=sample), traits)
    for dtype in DTYPES:
        traits = {"dtype": dtype_name(dtype)}
        yield Case("gemm_4bit", f"expanded rows,{traits['dtype']}", partial(_expanded_rows, dtype=dtype), traits)
        for shape, names in product(("130 rows", "N long, K no multiple of 256"), LESS_EXACT):
            name = f"less exact matmuls by {names},{shape},{traits['dtype']}"
            for primitive, check in (("gemm_4bit", _check), ("gemm_4bit_backward", _check_backward)):
                of_sample = partial(check, sample=Sample(dtype, shape, bias=False))
                yield Case(primitive, name, partial(check_less_exact, check=of_sample, names=names), traits)


_REQUIRED: dict[str, tuple[str, ...]] = {
    "dtype": tuple(dtype_name(dtype) for dtype in DTYPES),
    "shape": tuple(SHAPES),
    "blocksize": tuple(str(blocksize) for blocksize in BLOCKSIZES),
    "quant_type": QUANT_TYPES,
    "quant_storage": tuple(dtype_name(dtype) for dtype in QUANT_STORAGES),
    "scales": ("f32", "double-quantized"),
    "layout": tuple(LAYOUTS),
    "values": VALUES,
}
REQUIRED = {"gemm_4bit": {**_REQUIRED, "bias": ("bias", "no bias")}, "gemm_4bit_backward": _REQUIRED}
