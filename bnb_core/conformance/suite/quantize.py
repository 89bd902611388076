"""Section 2: blockwise quantization, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.checks import BLOCKSIZES, QUANT_STORAGES, QUANT_TYPES
from bnb_core.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from bnb_core.conformance import oracle
from bnb_core.conformance.case import Case, Context
from bnb_core.conformance.compare import same_bits
from bnb_core.conformance.values import DTYPES, LAYOUTS, VALUES, dtype_name, midpoints
from bnb_core.records import Weight4bit

CODES: dict[str, Callable[[], Tensor]] = {
    "dynamic": create_dynamic_map,
    "dynamic unsigned": lambda: create_dynamic_map(signed=False),
    "linear": create_linear_map,
    "fp8": create_fp8_map,
    "normal": create_normal_map,
    "crowded": lambda: torch.cat([torch.linspace(-1, -0.95, 128), torch.linspace(0.95, 1, 128)]),
    "fine around zero": lambda: torch.linspace(-1, 1, 256) ** 15,
    "positive": lambda: torch.linspace(0.5, 1.5, 256),
    "repeated": lambda: torch.linspace(-1, 1, 64).repeat_interleave(4),
}

LONG = 2**16
"""Elements from which a backend may prepare tables for a codebook."""

# (name, shape as a function of the block size)
SHAPES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "one": lambda B: (1,),
    "scalar": lambda B: (),
    "empty": lambda B: (0, 5),
    "odd": lambda B: (2 * B + 33,),
    "one block": lambda B: (B,),
    "short last block": lambda B: (3 * B + 7,),
    "rows shorter than a block": lambda B: (13, 5),
    "matrix": lambda B: (7, 2 * B + 1),
    "3-D": lambda B: (3, 5, B // 2 + 3),
    "4-D": lambda B: (2, 3, 4, B // 4 + 1),
    "many blocks": lambda B: (67, 3 * B),
    "more blocks than a nested one": lambda B: (1300 * B + 7,),
}


@dataclass(frozen=True)
class Sample:
    """One tensor to quantize, by its classes."""

    dtype: torch.dtype
    blocksize: int
    shape: str = "short last block"
    values: str = "normal"
    layout: str = "contiguous"

    @property
    def traits(self) -> dict[str, str]:
        names = {"shape": self.shape, "values": self.values, "layout": self.layout}
        return {"dtype": dtype_name(self.dtype), "blocksize": str(self.blocksize), **names}

    @property
    def name(self) -> str:
        return ",".join(self.traits.values())

    @property
    def size(self) -> tuple[int, ...]:
        return SHAPES[self.shape](self.blocksize)

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()

    def tensor(self, context: Context) -> Tensor:
        values = VALUES[self.values](self.numel, self.dtype, context.generator(self.name))
        return LAYOUTS[self.layout](values.view(self.size))


def _samples() -> Iterator[Sample]:
    """Every dtype with every block size, and with every other class at least once."""
    for dtype in DTYPES:
        for blocksize in BLOCKSIZES:
            yield Sample(dtype, blocksize)
        for shape in SHAPES:
            yield Sample(dtype, 64, shape)
        for values in VALUES:
            yield Sample(dtype, 32, values=values)
            yield Sample(dtype, 256, "many blocks", values)
        for layout in LAYOUTS:
            yield Sample(dtype, 64, "matrix", "outliers", layout)


SAMPLES = tuple(dict.fromkeys(_samples()))


def _flat(A: Tensor) -> oracle.F32:
    return A.float().contiguous().resolve_neg().view(-1).numpy()


def _check_quantize_blockwise(context: Context, A: Tensor, code: Tensor, blocksize: int) -> None:
    q, absmax = context.call(primitives.quantize_blockwise, A, code, blocksize)
    with np.errstate(all="ignore"):
        codes, scales = oracle.quantize_blockwise(_flat(A), code.numpy(), blocksize)
    same_bits("codes", q, torch.from_numpy(codes).view(A.shape))
    same_bits("absmax", absmax, scales)


def _check_quantize_4bit(context: Context, A: Tensor, blocksize: int, quant_type: str, storage: torch.dtype) -> None:
    packed, absmax = context.call(primitives.quantize_4bit, A, blocksize, quant_type, storage)
    with np.errstate(all="ignore"):
        expected, scales = oracle.quantize_4bit(_flat(A), blocksize, quant_type)
    zeros = np.zeros(-len(expected) % storage.itemsize, dtype=np.uint8)
    same_bits("packed", packed.view(torch.uint8).view(-1), np.concatenate([expected, zeros]))
    same_bits("absmax", absmax, scales)


def _scales(count: int, generator: torch.Generator) -> Tensor:
    """Positive ones and, where there is room, such as only odd blocks have: zero, infinity, NaN, the extremes."""
    scales = torch.rand(count, generator=generator) * 3
    for index, special in enumerate((0.0, float("inf"), float("nan"), 2.0**-126, 3e38)):
        if count > 2 * index + 8:
            scales[2 * index + 1] = special
    return scales


def _check_dequantize_blockwise(context: Context, sample: Sample, code_name: str) -> None:
    generator, code = context.generator(sample.name), CODES[code_name]()
    codes = torch.randint(0, 256, sample.size, generator=generator, dtype=torch.uint8)
    absmax = _scales(primitives.block_count(sample.numel, sample.blocksize), generator)
    given, given_absmax, given_code = map(LAYOUTS[sample.layout], (codes, absmax, code))
    arguments = (given, given_absmax, given_code, sample.blocksize, sample.dtype)
    (got,) = context.call(primitives.dequantize_blockwise, *arguments)
    with np.errstate(all="ignore"):
        expected = oracle.dequantize(codes.view(-1).numpy(), absmax.numpy(), code.numpy(), sample.blocksize)
    same_bits("values", got, torch.from_numpy(expected).to(sample.dtype).view(sample.size))


def _check_dequantize_4bit(
    context: Context, sample: Sample, quant_type: str, storage: torch.dtype, nested_blocksize: int | None = None
) -> None:
    generator, n = context.generator(sample.name), sample.numel
    # What fills up the last element of the storage is random, too, for it counts for nothing.
    stored_bytes = (n + 1) // 2 + -((n + 1) // 2) % storage.itemsize
    packed = torch.randint(0, 256, (stored_bytes,), generator=generator, dtype=torch.uint8)
    blocks = primitives.block_count(n, sample.blocksize)
    absmax = _scales(blocks, generator)
    nested: tuple[Any, ...] = ()
    scales = absmax.numpy()
    if nested_blocksize is not None:
        absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        nested_absmax = _scales(primitives.block_count(blocks, nested_blocksize), generator)
        tensors = (nested_absmax, create_dynamic_map(), torch.tensor(0.7))
        nested = (*map(LAYOUTS[sample.layout], tensors[:2]), tensors[2], nested_blocksize)
        with np.errstate(all="ignore"):
            scales = oracle.double_quantized_scales(absmax.numpy(), nested_blocksize, *(t.numpy() for t in tensors))
    given, given_absmax = map(LAYOUTS[sample.layout], (packed.view(storage).unsqueeze(1), absmax))
    weight = Weight4bit(given, sample.size, given_absmax, sample.blocksize, quant_type, *nested)
    (got,) = context.call(primitives.dequantize_4bit, weight, sample.dtype)
    with np.errstate(all="ignore"):
        expected = oracle.dequantize_4bit(packed.numpy(), scales, n, sample.blocksize, quant_type)
    same_bits("values", got, torch.from_numpy(expected).to(sample.dtype).view(sample.size))


def _blockwise_of(context: Context, sample: Sample, code_name: str) -> None:
    _check_quantize_blockwise(context, sample.tensor(context), CODES[code_name](), sample.blocksize)


def _4bit_of(context: Context, sample: Sample, quant_type: str, storage: torch.dtype) -> None:
    _check_quantize_4bit(context, sample.tensor(context), sample.blocksize, quant_type, storage)


def _blockwise_midpoints(context: Context, code_name: str, least: int = 1) -> None:
    code = CODES[code_name]()
    blocks = midpoints(code, 256)
    _check_quantize_blockwise(context, blocks.repeat(-(-least // blocks.numel())), code, 256)


def _4bit_midpoints(context: Context, quant_type: str) -> None:
    code = get_4bit_type(quant_type).sort().values
    _check_quantize_4bit(context, midpoints(code, 64), 64, quant_type, torch.uint8)


def _edited_code(context: Context) -> None:
    """A codebook is data: no backend may remember what it held at an earlier call."""
    code, A = create_dynamic_map(), torch.linspace(-1, 1, 300)
    _check_quantize_blockwise(context, A, code, 64)
    code[10:20] += 0.001
    _check_quantize_blockwise(context, A, code.sort().values, 64)


def cases() -> Iterator[Case]:
    for sample in SAMPLES:
        traits, name = sample.traits, sample.name
        run = partial(_blockwise_of, sample=sample, code_name="dynamic")
        yield Case("quantize_blockwise", name, run, traits)
        run = partial(_check_dequantize_blockwise, sample=sample, code_name="dynamic")
        yield Case("dequantize_blockwise", name, run, traits)
        for quant_type in QUANT_TYPES:
            traits = {**sample.traits, "quant_type": quant_type}
            run = partial(_4bit_of, sample=sample, quant_type=quant_type, storage=torch.uint8)
            yield Case("quantize_4bit", f"{quant_type},{name}", run, traits)
            run = partial(_check_dequantize_4bit, sample=sample, quant_type=quant_type, storage=torch.uint8)
            yield Case("dequantize_4bit", f"{quant_type},{name}", run, {**traits, "scales": "f32"})
    yield from _double_quantized_cases()
    yield from _storage_cases()
    yield from _code_cases()


def _double_quantized_cases() -> Iterator[Case]:
    """Of dequantize_4bit: the usual nested blocks, and small ones with several ends in one tensor."""
    samples = [Sample(dtype, 64, shape) for dtype in DTYPES for shape in SHAPES]
    samples += [Sample(torch.float32, 64, layout=layout) for layout in LAYOUTS if layout != "contiguous"]
    for sample in samples:
        for nested_blocksize in (256, 32):
            run = partial(
                _check_dequantize_4bit,
                sample=sample,
                quant_type="nf4",
                storage=torch.uint8,
                nested_blocksize=nested_blocksize,
            )
            name = f"double-quantized,{nested_blocksize},{sample.name}"
            yield Case("dequantize_4bit", name, run, {**sample.traits, "scales": "double-quantized"})


def _storage_cases() -> Iterator[Case]:
    for storage in QUANT_STORAGES:
        for shape, layout in product(("one block", "odd"), LAYOUTS):
            sample = Sample(torch.float32, 64, shape, layout=layout)
            traits = {"quant_storage": dtype_name(storage), "shape": shape, "layout": layout}
            name = f"storage,{','.join(traits.values())}"
            run = partial(_4bit_of, sample=sample, quant_type="nf4", storage=storage)
            yield Case("quantize_4bit", name, run, traits)
            if layout == "negated" and storage.is_floating_point:
                continue  # torch takes the codes for numbers then, and sets a bit of those that are none
            run = partial(_check_dequantize_4bit, sample=sample, quant_type="nf4", storage=storage)
            yield Case("dequantize_4bit", name, run, traits)


def _code_cases() -> Iterator[Case]:
    for code_name in CODES:
        sample, traits = Sample(torch.float32, 128, "many blocks"), {"code": code_name}
        run = partial(_blockwise_of, sample=sample, code_name=code_name)
        yield Case("quantize_blockwise", f"code,{code_name}", run, traits)
        run = partial(_check_dequantize_blockwise, sample=sample, code_name=code_name)
        yield Case("dequantize_blockwise", f"code,{code_name}", run, traits)
        run = partial(_blockwise_midpoints, code_name=code_name)
        yield Case("quantize_blockwise", f"midpoints,{code_name}", run, {"values": "midpoints"})
        run = partial(_blockwise_midpoints, code_name=code_name, least=LONG)
        yield Case("quantize_blockwise", f"midpoints,{code_name},long", run, {"values": "midpoints"})
    for quant_type in QUANT_TYPES:
        run = partial(_4bit_midpoints, quant_type=quant_type)
        yield Case("quantize_4bit", f"midpoints,{quant_type}", run, {"values": "midpoints"})
    yield Case("quantize_blockwise", "code edited in place", _edited_code, {"code": "edited"})


_CLASSES = {
    "dtype": tuple(dtype_name(dtype) for dtype in DTYPES),
    "blocksize": tuple(str(blocksize) for blocksize in BLOCKSIZES),
    "shape": tuple(SHAPES),
    "layout": tuple(LAYOUTS),
}
_FOUR_BIT = {"quant_type": QUANT_TYPES, "quant_storage": tuple(dtype_name(dtype) for dtype in QUANT_STORAGES)}
_VALUES = {"values": (*VALUES, "midpoints")}

REQUIRED = {
    "quantize_blockwise": {**_CLASSES, **_VALUES, "code": tuple(CODES)},
    "dequantize_blockwise": {**_CLASSES, "code": tuple(CODES)},
    "quantize_4bit": {**_CLASSES, **_VALUES, **_FOUR_BIT},
    "dequantize_4bit": {**_CLASSES, **_FOUR_BIT, "scales": ("f32", "double-quantized")},
}
"""For each primitive, the classes of each trait that must have a case."""
