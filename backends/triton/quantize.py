"""Blockwise quantization (docs/SPEC.md section 2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnb_core.records import Weight4bit

from .encode import codes_4bit, count_below, midpoints_of, scaled_blocks, values_4bit
from .launch import TILE, launch
from .weight_4bit import block_scales, constants_of, tensors_of


@triton.jit
def quantize_blockwise_kernel(A, code, q, absmax, n, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - first, TILE).to(tl.int32)
    index = tl.arange(0, TILE)
    block = tl.arange(0, BLOCKS)
    values = tl.load(A + first + index, mask=index < left, other=0.0).to(tl.float32)
    scaled, scales = scaled_blocks(tl.reshape(values, [BLOCKS, BLOCKSIZE]))
    codes = count_below(midpoints_of(code), tl.reshape(scaled, [TILE]), 8)
    tl.store(q + first + index, codes.to(tl.uint8), mask=index < left)
    tl.store(absmax + first // BLOCKSIZE + block, scales, mask=block * BLOCKSIZE < left)


@triton.jit
def dequantize_blockwise_kernel(q, absmax, code, out, n, BLOCKSIZE: tl.constexpr, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE
    index = tl.arange(0, TILE)
    inside = index < n - first
    codes = tl.load(q + first + index, mask=inside, other=0).to(tl.int32)
    scales = tl.load(absmax + (first + index) // BLOCKSIZE, mask=inside, other=0.0)
    values = tl.load(code + codes) * scales
    tl.store(out + first + index, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_4bit_kernel(A, packed, absmax, n, QUANT_TYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - first, TILE).to(tl.int32)
    index = tl.arange(0, TILE)
    block = tl.arange(0, BLOCKS)
    byte = tl.arange(0, TILE // 2)
    values = tl.load(A + first + index, mask=index < left, other=0.0).to(tl.float32)
    scaled, scales = scaled_blocks(tl.reshape(values, [BLOCKS, BLOCKSIZE]))
    codes = codes_4bit(tl.reshape(scaled, [TILE]), QUANT_TYPE)
    high, low = tl.split(tl.reshape(codes, [TILE // 2, 2]))
    tl.store(packed + first // 2 + byte, (high * 16 + low).to(tl.uint8), mask=byte * 2 < left)
    tl.store(absmax + first // BLOCKSIZE + block, scales, mask=block * BLOCKSIZE < left)


@triton.jit
def dequantize_4bit_kernel(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    out,
    n,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - first, TILE).to(tl.int32)
    index = tl.arange(0, TILE)
    byte = tl.arange(0, TILE // 2)
    pairs = tl.load(packed + first // 2 + byte, mask=byte * 2 < left, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pairs >> 4, pairs & 15), [TILE])
    block = (first + index) // BLOCKSIZE
    scales = block_scales(block, index < left, absmax, nested_absmax, nested_code, offset, NESTED_BLOCKSIZE)
    values = tl.gather(values_4bit(QUANT_TYPE), codes, 0) * scales
    tl.store(out + first + index, values.to(out.dtype.element_ty), mask=index < left)


def _blocks_per_program(blocksize: int) -> int:
    return max(1, TILE // blocksize)


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int, out: tuple[Tensor, Tensor]) -> None:
    q, absmax = out
    blocks = _blocks_per_program(blocksize)
    programs = triton.cdiv(absmax.numel(), blocks)
    launch(quantize_blockwise_kernel, programs, A, code, q, absmax, A.numel(), BLOCKSIZE=blocksize, BLOCKS=blocks)


def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    n = A.numel()
    programs = triton.cdiv(n, TILE)
    launch(dequantize_blockwise_kernel, programs, A, absmax, code, out, n, BLOCKSIZE=blocksize, TILE=TILE)


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, out: tuple[Tensor, Tensor]
) -> None:
    packed, absmax = out[0].view(-1).view(torch.uint8), out[1]
    blocks = _blocks_per_program(blocksize)
    programs = triton.cdiv(absmax.numel(), blocks)
    constants = {"QUANT_TYPE": quant_type, "BLOCKSIZE": blocksize, "BLOCKS": blocks}
    launch(quantize_4bit_kernel, programs, A, packed, absmax, A.numel(), **constants)


def dequantize_4bit(A: Weight4bit, dtype: torch.dtype, out: Tensor) -> None:
    n = out.numel()
    programs = triton.cdiv(n, TILE)
    launch(dequantize_4bit_kernel, programs, *tensors_of(A), out, n, **constants_of(A), TILE=TILE)
