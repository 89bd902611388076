"""Matmul with a 4-bit weight (docs/SPEC.md section 3): the weight is decoded in the kernel, tile by tile."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnb_core.records import Weight4bit

from ..dequantized import LEAST_TERMS, Dense, dense_for
from .encode import values_4bit
from .launch import SMALLEST_DOT, launch, tile_of_program, tiles
from .weight_4bit import block_scales, constants_of, tensors_of

FUSED_ROWS = 64
"""Up to so many rows of A are multiplied here; above, torch's matmul reads the weight from the cache as often as it
needs."""


@triton.jit
def weight_codes(packed, row, is_row, first, K, K_IS_EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes i32[ROWS, COLUMNS] of rows that start at row i64[ROWS], from their even column ``first`` on.

    Where a row has an even length, each byte is loaded once.
    """
    if K_IS_EVEN:
        half = first // 2 + tl.arange(0, COLUMNS // 2)
        inside = is_row[:, None] & (half < K // 2)[None, :]
        pairs = tl.load(packed + (row // 2)[:, None] + half[None, :], mask=inside, other=0).to(tl.int32)
        return tl.reshape(tl.join(pairs >> 4, pairs & 15), [ROWS, COLUMNS])
    else:
        k = first + tl.arange(0, COLUMNS)
        place = row[:, None] + k[None, :]
        pairs = tl.load(packed + place // 2, mask=is_row[:, None] & (k < K)[None, :], other=0).to(tl.int32)
        return tl.where(place % 2 == 0, pairs >> 4, pairs & 15)


@triton.jit
def dot_exactly(x, weight, total):
    """total + x @ weight^T: an f32 weight is taken in two parts of x's dtype, which hold all of it but 2^-16."""
    high = weight.to(x.dtype)
    total = tl.dot(x, tl.trans(high), total, input_precision="ieee")
    if x.dtype == tl.float32:
        return total
    else:
        low = (weight - high.to(tl.float32)).to(x.dtype)
        return tl.dot(x, tl.trans(low), total)


@triton.jit
def add_products(x, values, scales, total, SCALE_PER_ROW: tl.constexpr):
    """total + x @ (values * scales)^T.

    f32 and bf16 reach as far as the scales do. f16 does not, and a small weight would lose its digits: it multiplies by
    the values alone or, where a row has several scales, in f32.
    """
    if x.dtype != tl.float16:
        return dot_exactly(x, values * scales, total)
    elif SCALE_PER_ROW:
        return total + dot_exactly(x, values, tl.zeros_like(total)) * tl.trans(scales)
    else:
        return dot_exactly(x.to(tl.float32), values * scales, total)


@triton.jit
def decoded_weight(
    packed, values, row, is_row, first, K, K_IS_EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The values of :func:`weight_codes`, without their scales."""
    codes = weight_codes(packed, row, is_row, first, K, K_IS_EVEN, ROWS, COLUMNS)
    return tl.reshape(tl.gather(values, tl.reshape(codes, [ROWS * COLUMNS]), 0), [ROWS, COLUMNS])


@triton.jit
def tile_products(
    A,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    m,
    is_m,
    row,
    is_row,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """The sums f32[TILE_M, TILE_N] of rows m of A with rows of the weight, which start at element ``row``.

    With TILE_M 1 by products and a sum in f32, else by tl.dot in A's dtype. SCALE_PER_ROW: no row of a tile of the
    weight reaches into a second block.
    """
    values = values_4bit(QUANT_TYPE)
    total = tl.zeros([TILE_N, TILE_K] if TILE_M == 1 else [TILE_M, TILE_N], tl.float32)
    for first in range(0, K, TILE_K):
        k = first + tl.arange(0, TILE_K)
        decoded = decoded_weight(packed, values, row, is_row, first, K, K_IS_EVEN, TILE_N, TILE_K)
        if SCALE_PER_ROW:
            block, inside = ((row + first) // BLOCKSIZE)[:, None], is_row[:, None]
        else:
            block, inside = (row[:, None] + k[None, :]) // BLOCKSIZE, is_row[:, None] & (k < K)[None, :]
        scales = block_scales(block, inside, absmax, nested_absmax, nested_code, offset, NESTED_BLOCKSIZE)
        x = tl.load(A + m[:, None] * K + k[None, :], mask=is_m[:, None] & (k < K)[None, :], other=0.0)
        if TILE_M == 1:
            total += x.to(tl.float32) * (decoded * scales)
        else:
            total = add_products(x, decoded, scales, total, SCALE_PER_ROW)
    if TILE_M == 1:
        total = tl.sum(total, axis=1)[None, :]
    return total


@triton.jit
def store_products(total, bias, first_bias, out, m, is_m, n, N):
    """out[m, n] = total + bias[first_bias + n]."""
    if bias is not None:
        total += tl.load(bias + first_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = is_m[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gemm_4bit_kernel(
    A,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    bias,
    out,
    M,
    N,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """A tile of the result."""
    m, n = tile_of_program(N, TILE_M, TILE_N)
    total = tile_products(
        *(A, packed, absmax, nested_absmax, nested_code, offset, m, m < M, n * K, n < N, K),
        *(QUANT_TYPE, BLOCKSIZE, NESTED_BLOCKSIZE, K_IS_EVEN, SCALE_PER_ROW, TILE_M, TILE_N, TILE_K),
    )
    store_products(total, bias, 0, out, m, m < M, n, N)


def tile(M: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of one program for so many rows of so many entries: as large as no GPU's registers overflow."""
    if M == 1:
        return {"TILE_M": 1, "TILE_N": 32, "TILE_K": 64}
    tile_m = min(max(triton.next_power_of_2(M), SMALLEST_DOT), 32)
    return {"TILE_M": tile_m, "TILE_N": 32, "TILE_K": 32 if dtype != torch.float32 and K % 32 == 0 else 16}


def gemm_4bit(A: Tensor, B: Weight4bit, bias: Tensor | None, out: Tensor) -> Dense:
    (N, K), M = B.shape, math.prod(A.shape[:-1])
    if M > FUSED_ROWS and K >= LEAST_TERMS:
        return Dense.IN_DTYPE
    shape_of_tile = tile(M, K, A.dtype)
    tile_k = shape_of_tile["TILE_K"]
    launch(
        gemm_4bit_kernel,
        tiles(M, N, shape_of_tile["TILE_M"], shape_of_tile["TILE_N"]),
        *(A, *tensors_of(B), bias, out, M, N, K),
        **constants_of(B),
        K_IS_EVEN=K % 2 == 0,
        SCALE_PER_ROW=K % tile_k == 0 and B.blocksize % tile_k == 0,
        **shape_of_tile,
    )
    return Dense.NOTHING


def gemm_4bit_backward(dY: Tensor, B: Weight4bit, out: Tensor) -> Dense:
    return dense_for(dY.dtype, terms=B.shape[0])
