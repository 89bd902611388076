"""Sizes past 32-bit indices, and bits compared with the reference over a large sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bnb_core import primitives, registry
from bnb_core.checks import QUANT_TYPES
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance.case import Case, Context
from bnb_core.conformance.compare import same_bits
from bnb_core.conformance.runner import Skip
from bnb_core.conformance.values import DTYPES, dtype_name
from bnb_core.records import Weight4bit

PAST_32_BITS = 2**31 + 2**12 + 7
BLOCKSIZE = 4096
SAMPLE = 10**8
CHUNK = 2**22
GIB = 2**30


def _require_memory(context: Context, gibibytes: float) -> None:
    """Skip where the device has not that much free memory."""
    if context.device.type == "cpu":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    elif context.device.type == "cuda":
        free = torch.cuda.mem_get_info(context.device)[0]
    else:
        return
    if free < gibibytes * GIB:
        raise Skip(f"needs {gibibytes} GiB of free memory on {context.device}, there are {free / GIB:.1f}")


def _spots(n: int) -> list[slice]:
    """Whole blocks at the start, around element 2^31 and at the end, the last one short."""
    blocks = (0, 2**31 // BLOCKSIZE - 1, 2**31 // BLOCKSIZE, n // BLOCKSIZE)
    return [slice(block * BLOCKSIZE, min(n, (block + 1) * BLOCKSIZE)) for block in blocks]


def _filled(context: Context, n: int, dtype: torch.dtype) -> Tensor:
    """Values that differ from block to block and repeat nowhere near 2^31 elements apart."""
    A = torch.empty(n, dtype=dtype, device=context.device)
    pattern = torch.randn(CHUNK, generator=context.generator("large")).to(dtype).to(context.device)
    for index, part in enumerate(A.split(CHUNK)):
        torch.mul(pattern[: len(part)], 1 + index / 64, out=part)
    return A


def _large_quantize_4bit(context: Context) -> None:
    _require_memory(context, 8)
    A = _filled(context, PAST_32_BITS, torch.bfloat16)
    packed, absmax = primitives.quantize_4bit(A, BLOCKSIZE, "nf4", torch.uint8)
    for spot in _spots(PAST_32_BITS):
        part, part_absmax = primitives.quantize_4bit(A[spot].clone(), BLOCKSIZE, "nf4", torch.uint8)
        same_bits("packed", packed[spot.start // 2 : (spot.stop + 1) // 2].cpu(), part.cpu())
        block = spot.start // BLOCKSIZE
        same_bits("absmax", absmax[block : block + 1].cpu(), part_absmax.cpu())


def _large_dequantize_4bit(context: Context) -> None:
    _require_memory(context, 8)
    packed = torch.randint(0, 256, ((PAST_32_BITS + 1) // 2, 1), dtype=torch.uint8, device=context.device)
    absmax = torch.rand(primitives.block_count(PAST_32_BITS, BLOCKSIZE), device=context.device)
    weight = Weight4bit(packed, (PAST_32_BITS,), absmax, BLOCKSIZE, "nf4")
    got = primitives.dequantize_4bit(weight, torch.bfloat16)
    for spot in _spots(PAST_32_BITS):
        block = spot.start // BLOCKSIZE
        part = weight._replace(
            packed=packed[spot.start // 2 : (spot.stop + 1) // 2].clone(),
            shape=(spot.stop - spot.start,),
            absmax=absmax[block : block + 1].clone(),
        )
        same_bits("values", got[spot].cpu(), primitives.dequantize_4bit(part, torch.bfloat16).cpu())


def _large_blockwise(context: Context) -> None:
    _require_memory(context, 14)
    A, code = _filled(context, PAST_32_BITS, torch.bfloat16), create_dynamic_map().to(context.device)
    q, absmax = primitives.quantize_blockwise(A, code, BLOCKSIZE)
    back = primitives.dequantize_blockwise(q, absmax, code, BLOCKSIZE, torch.bfloat16)
    for spot in _spots(PAST_32_BITS):
        part, part_absmax = primitives.quantize_blockwise(A[spot].clone(), code, BLOCKSIZE)
        same_bits("codes", q[spot].cpu(), part.cpu())
        block = spot.start // BLOCKSIZE
        same_bits("absmax", absmax[block : block + 1].cpu(), part_absmax.cpu())
        values = primitives.dequantize_blockwise(part, part_absmax, code, BLOCKSIZE, torch.bfloat16)
        same_bits("values", back[spot].cpu(), values.cpu())


def _like_the_reference(context: Context, dtype: torch.dtype, call: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """The same bits as the reference's for 10^8 random elements of very different sizes."""
    generator = context.generator(f"sample,{dtype}")
    for _ in range(0, SAMPLE, CHUNK):
        A = torch.randn(CHUNK, generator=generator) * torch.exp(4 * torch.randn(CHUNK, generator=generator))
        A = A.to(dtype).to(context.device)
        got = call(A)
        with registry.use_backend("reference"):
            expected = call(A)
        if context.backend != "reference":
            context.served = {served for served in context.served if served[1] != "reference"}
        for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            same_bits(f"output {index}", mine.cpu(), theirs.cpu())


def _blockwise_round_trip(A: Tensor) -> tuple[Tensor, ...]:
    return primitives.quantize_blockwise(A, create_dynamic_map().to(A.device), 256)


def _4bit(A: Tensor, quant_type: str) -> tuple[Tensor, ...]:
    return primitives.quantize_4bit(A, 64, quant_type, torch.uint8)


def _int8(A: Tensor) -> tuple[Tensor, ...]:
    return primitives.int8_vectorwise_quant(A.view(-1, 4096), 0.0)


def cases() -> Iterator[Case]:
    for primitive, run in (
        ("quantize_4bit", _large_quantize_4bit),
        ("dequantize_4bit", _large_dequantize_4bit),
        ("quantize_blockwise", _large_blockwise),
        ("dequantize_blockwise", _large_blockwise),
    ):
        yield Case(primitive, "large,more than 2^31 elements", run, {"size": "large"}, large=True)
    compared: dict[tuple[str, str], Callable[[Tensor], tuple[Tensor, ...]]] = {
        ("quantize_blockwise", ""): _blockwise_round_trip,
        **{("quantize_4bit", f",{name}"): partial(_4bit, quant_type=name) for name in QUANT_TYPES},
        ("int8_vectorwise_quant", ""): _int8,
    }
    for dtype, ((primitive, label), call) in product(DTYPES, compared.items()):
        sample = partial(_like_the_reference, dtype=dtype, call=call)
        traits = {"dtype": dtype_name(dtype), "size": "large"}
        yield Case(primitive, f"large,10^8 elements,{dtype_name(dtype)}{label}", sample, traits, large=True)


_LARGE: dict[str, tuple[str, ...]] = {"size": ("large",)}
_QUANTIZERS = ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise")
REQUIRED = dict.fromkeys(_QUANTIZERS, _LARGE)
