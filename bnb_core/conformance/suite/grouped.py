"""Section 3: matmul with a 4-bit weight for each group of rows, within the bound of a matmul with one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, cycle

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.checks import BLOCKSIZES, QUANT_TYPES
from bnb_core.conformance import oracle
from bnb_core.conformance.case import Case, Context
from bnb_core.conformance.compare import near_product, same_bits
from bnb_core.conformance.precision import LESS_EXACT, check_less_exact
from bnb_core.conformance.suite.gemm_4bit import USUAL, VALUES, Sample
from bnb_core.conformance.values import DTYPES, LAYOUTS, contiguous_copy, dtype_name, rows
from bnb_core.records import Weight4bit

# (rows of each group, N, K)
SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "one group": ((5,), 40, 64),
    "one group of one row": ((1,), 33, 128),
    "empty groups": ((0, 3, 0, 0, 2, 0), 64, 96),
    "one row in all": ((0, 0, 1, 0), 48, 192),
    "a row each": ((1,) * 8, 64, 128),
    "all rows in one group": ((0, 0, 40, 0), 70, 192),
    "many rows": ((70, 0, 66, 5), 64, 192),
    "groups of every size": (tuple(range(12)), 64, 128),
    "130 rows": ((1, 129), 72, 320),
    "256 groups": (tuple(int(e % 17 == 3) + int(e % 50 == 0) for e in range(256)), 16, 32),
    "more than a thread's share": ((1, 6, 0, 3), 320, 512),
    "K no multiple of a block": ((3, 1, 4), 48, 100),
    "K odd": ((2, 0, 3), 64, 67),
    "K odd, many rows": ((70, 1, 3), 64, 65),
    "K shorter than a block": ((2, 3), 64, 8),
    "N no multiple of 32": ((4, 17), 47, 64),
    "no rows": ((0, 0, 0), 16, 64),
    "N of 0": ((2, 1), 0, 64),
    "K of 0": ((2, 1), 8, 0),
}


def _offsets(shape: str) -> Tensor:
    return torch.tensor([0, *accumulate(SHAPES[shape][0])], dtype=torch.int32)


def _weights(sample: Sample, generator: torch.Generator) -> tuple[Weight4bit, list[oracle.F64]]:
    groups, N, K = SHAPES[sample.shape]
    weights, values = sample.weight_of((len(groups), N, K), generator)
    return weights, list(values)


def _parts(tensor: Tensor, shape: str) -> tuple[Tensor, ...]:
    return tensor.split(SHAPES[shape][0])


def _inputs(sample: Sample, columns: int, generator: torch.Generator) -> Tensor:
    return LAYOUTS[sample.layout](rows((sum(SHAPES[sample.shape][0]), columns), sample.dtype, sample.values, generator))


def _check(context: Context, sample: Sample) -> None:
    generator = context.generator(f"grouped,{sample.name}")
    groups, N, K = SHAPES[sample.shape]
    weights, values = _weights(sample, generator)
    offsets, A = _offsets(sample.shape), _inputs(sample, K, generator)
    bias = torch.randn((len(groups), N), generator=generator).to(sample.dtype) if sample.bias else None
    (got,) = context.call(primitives.grouped_gemm_4bit, A, weights, offsets, bias)
    parts = zip(_parts(got, sample.shape), _parts(A, sample.shape), values, strict=True)
    for e, (result, of_group, value) in enumerate(parts):
        near_product(result, of_group, value.T, None if bias is None else bias[e])
    if sample.layout != "contiguous":
        copied = context.call(primitives.grouped_gemm_4bit, contiguous_copy(A), weights, offsets, bias)
        same_bits("result for a copy", got, *copied)


def _check_backward(context: Context, sample: Sample) -> None:
    generator = context.generator(f"grouped,{sample.name}")
    _, N, _ = SHAPES[sample.shape]
    weights, values = _weights(sample, generator)
    offsets, dY = _offsets(sample.shape), _inputs(sample, N, generator)
    (got,) = context.call(primitives.grouped_gemm_4bit_backward, dY, weights, offsets)
    for result, of_group, value in zip(_parts(got, sample.shape), _parts(dY, sample.shape), values, strict=True):
        near_product(result, of_group, value)
    if sample.layout != "contiguous":
        copied = context.call(primitives.grouped_gemm_4bit_backward, contiguous_copy(dY), weights, offsets)
        same_bits("result for a copy", got, *copied)


BLOCKS_OF_32 = ("K no multiple of a block", "256 groups")
DOUBLE_QUANTIZED = ("a row each", "many rows", "groups of every size", "K odd", "K no multiple of a block")


def _samples() -> Iterator[Sample]:
    for dtype in DTYPES:
        for shape in SHAPES:
            sample = Sample(dtype, shape, 32 if shape in BLOCKS_OF_32 else 64)
            yield sample
            if shape in DOUBLE_QUANTIZED:
                yield replace(sample, nested=True, bias=False)
        for quant_type in QUANT_TYPES:
            if quant_type != USUAL:
                yield Sample(dtype, "groups of every size", quant_type=quant_type)
    # One weight's product has each of these in every dtype.
    for dtype, layout in zip(cycle(DTYPES), LAYOUTS, strict=False):
        yield Sample(dtype, "empty groups", layout=layout)
    for dtype, values in zip(cycle(DTYPES), VALUES, strict=False):
        yield Sample(dtype, "a row each", values=values, bias=False)
    for dtype, blocksize in zip(cycle(DTYPES), BLOCKSIZES, strict=False):
        yield Sample(dtype, "a row each", blocksize, nested=True)
    yield Sample(torch.bfloat16, "many rows", values="nan row")
    yield Sample(torch.float16, "many rows", values="small scales")


def cases() -> Iterator[Case]:
    primitive, backward = "grouped_gemm_4bit", "grouped_gemm_4bit_backward"
    for sample in dict.fromkeys(_samples()):
        yield Case(primitive, sample.name, partial(_check, sample=sample), sample.traits)
    for sample in dict.fromkeys(replace(sample, bias=False) for sample in _samples()):
        traits = {key: value for key, value in sample.traits.items() if key != "bias"}
        yield Case(backward, ",".join(traits.values()), partial(_check_backward, sample=sample), traits)
    for dtype in DTYPES:
        for names in LESS_EXACT:
            name = f"less exact matmuls by {names},{dtype_name(dtype)}"
            for called, check in ((primitive, _check), (backward, _check_backward)):
                of_sample = partial(check, sample=Sample(dtype, "many rows", bias=False))
                run = partial(check_less_exact, check=of_sample, names=names)
                yield Case(called, name, run, {"dtype": dtype_name(dtype)})


_REQUIRED: dict[str, tuple[str, ...]] = {
    "dtype": tuple(dtype_name(dtype) for dtype in DTYPES),
    "shape": tuple(SHAPES),
    "blocksize": tuple(str(blocksize) for blocksize in BLOCKSIZES),
    "quant_type": QUANT_TYPES,
    "scales": ("f32", "double-quantized"),
    "layout": tuple(LAYOUTS),
    "values": VALUES,
}
REQUIRED = {
    "grouped_gemm_4bit": {**_REQUIRED, "bias": ("bias", "no bias")},
    "grouped_gemm_4bit_backward": _REQUIRED,
}
