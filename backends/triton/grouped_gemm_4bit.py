"""Matmul with a 4-bit weight for each group of rows (docs/SPEC.md section 3); only the device counts the rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bnb_core.records import Weight4bit

from .encode import values_4bit
from .gemm_4bit import add_products, decoded_weight, store_products, tile, tile_products
from .launch import launch
from .weight_4bit import block_scales, constants_of, tensors_of

BACKWARD_TILE = {"TILE_M": 16, "TILE_N": 32, "TILE_K": 64}


@triton.jit
def tile_of_group(offsets, T, E, columns, GROUPS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """This program's group, its rows i64[TILE_ROWS], where they end, and its columns i64[TILE_COLUMNS].

    A program beyond the last tile has no row before the end.
    """
    across = tl.cdiv(columns, TILE_COLUMNS)
    number, column = (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64)
    e = tl.arange(0, GROUPS).to(tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(offsets + e, mask=e < E, other=0).to(tl.int64), 0), T)
    end = tl.minimum(tl.load(offsets + e + 1, mask=e < E, other=0).to(tl.int64), T)
    count = tl.cdiv(tl.maximum(end - begin, 0), TILE_ROWS)
    before = tl.cumsum(count, 0) - count
    is_here = (number >= before) & (number < before + count)
    group = tl.sum(tl.where(is_here, e, 0), 0)
    first = tl.sum(tl.where(is_here, begin + (number - before) * TILE_ROWS, 0), 0)
    until = tl.sum(tl.where(is_here, end, 0), 0)
    return group, first + tl.arange(0, TILE_ROWS), until, column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)


@triton.jit(do_not_specialize=["T"])
def grouped_gemm_4bit_kernel(
    A,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    offsets,
    bias,
    out,
    T,
    E,
    N,
    K,
    GROUPS: tl.constexpr,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """A tile of the rows of one group with its weight, as gemm_4bit_kernel takes it."""
    group, m, until, n = tile_of_group(offsets, T, E, N, GROUPS, TILE_M, TILE_N)
    if tl.min(m, 0) >= until:
        return
    total = tile_products(
        *(A, packed, absmax, nested_absmax, nested_code, offset, m, m < until, (group * N + n) * K, n < N, K),
        *(QUANT_TYPE, BLOCKSIZE, NESTED_BLOCKSIZE, K_IS_EVEN, SCALE_PER_ROW, TILE_M, TILE_N, TILE_K),
    )
    store_products(total, bias, group * N, out, m, m < until, n, N)


@triton.jit(do_not_specialize=["T"])
def grouped_gemm_4bit_backward_kernel(
    dY,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    offsets,
    dA,
    T,
    E,
    N,
    K,
    GROUPS: tl.constexpr,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """A tile of dA: rows of one group, and TILE_K columns of its weight."""
    group, m, until, k = tile_of_group(offsets, T, E, K, GROUPS, TILE_M, TILE_K)
    if tl.min(m, 0) >= until:
        return
    first_column = tl.min(k, 0)
    values = values_4bit(QUANT_TYPE)
    total = tl.zeros([TILE_M, TILE_K], tl.float32)
    for first in range(0, N, TILE_N):
        n = first + tl.arange(0, TILE_N)
        row = (group * N + n) * K
        block, inside = (row[:, None] + k[None, :]) // BLOCKSIZE, (n < N)[:, None] & (k < K)[None, :]
        decoded = decoded_weight(packed, values, row, n < N, first_column, K, K_IS_EVEN, TILE_N, TILE_K)
        scales = block_scales(block, inside, absmax, nested_absmax, nested_code, offset, NESTED_BLOCKSIZE)
        y = tl.load(dY + m[:, None] * N + n[None, :], mask=(m < until)[:, None] & (n < N)[None, :], other=0.0)
        total = add_products(y, tl.trans(decoded), tl.trans(scales), total, False)
    inside_out = (m < until)[:, None] & (k < K)[None, :]
    tl.store(dA + m[:, None] * K + k[None, :], total.to(dA.dtype.element_ty), mask=inside_out)


def grouped_gemm_4bit(A: Tensor, B: Weight4bit, offsets: Tensor, bias: Tensor | None, out: Tensor) -> None:
    (E, N, K), T = B.shape, A.shape[0]
    shape = tile(max(1, T // E), K, A.dtype)
    launch(
        grouped_gemm_4bit_kernel,
        most_tiles(T, E, shape["TILE_M"]) * triton.cdiv(N, shape["TILE_N"]),
        *(A, *tensors_of(B), offsets, bias, out, T, E, N, K),
        GROUPS=triton.next_power_of_2(E),
        **constants_of(B),
        K_IS_EVEN=K % 2 == 0,
        SCALE_PER_ROW=K % shape["TILE_K"] == 0 and B.blocksize % shape["TILE_K"] == 0,
        **shape,
    )


def grouped_gemm_4bit_backward(dY: Tensor, B: Weight4bit, offsets: Tensor, out: Tensor) -> None:
    (E, N, K), T = B.shape, dY.shape[0]
    shape = BACKWARD_TILE
    launch(
        grouped_gemm_4bit_backward_kernel,
        most_tiles(T, E, shape["TILE_M"]) * triton.cdiv(K, shape["TILE_K"]),
        *(dY, *tensors_of(B), offsets, out, T, E, N, K),
        GROUPS=triton.next_power_of_2(E),
        **constants_of(B),
        K_IS_EVEN=K % 2 == 0,
        **shape,
    )


def most_tiles(rows: int, groups: int, tile_rows: int) -> int:
    """Of so many rows, whichever group they belong to: each group may have a tile that is not full."""
    return rows // tile_rows + min(groups, rows)
