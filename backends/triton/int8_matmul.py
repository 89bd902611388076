"""LLM.int8(): products of codes and what they stand for (docs/SPEC.md section 4)."""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnb_core.records import Int8Rows, Int8Weight

from ..dequantized import Dense, dense_for
from .launch import SMALLEST_DOT, launch, tile_of_program, tiles

CODE_SCALE = tl.constexpr(2.0**-7)
"""A code times it is exact in every dtype, and no product with that overflows."""


@triton.jit
def scaled_products(products, m, n, M, N, row_stats, col_stats, bias):
    """i32 products of codes as f32 products of what they stand for, plus the bias."""
    rows = tl.load(row_stats + m, mask=m < M, other=0.0)
    columns = tl.load(col_stats + n, mask=n < N, other=0.0)
    # Dividing first keeps values near the end of f32's range from overflowing on the way.
    result = products.to(tl.float32) * tl.div_rn(rows, 127.0 * 127.0)[:, None] * columns[None, :]
    if bias is not None:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit(do_not_specialize=["M"])
def int8_mm_dequant_kernel(products, row_stats, col_stats, bias, out, M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    m, n = tile_of_program(N, TILE_M, TILE_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m[:, None] * N + n[None, :]
    tile = tl.load(products + place, mask=inside, other=0)
    result = scaled_products(tile, m, n, M, N, row_stats, col_stats, bias)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_products(a, b, total, INT8_DOT: tl.constexpr):
    """total i32 + a @ b^T of codes i8, exact with and without INT8_DOT: f32 holds sums over up to 2^10 columns."""
    if INT8_DOT:
        return tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
    else:
        return total + tl.dot(a.to(tl.float16), tl.trans(b.to(tl.float16))).to(tl.int32)


@triton.jit(do_not_specialize=["M"])
def int8_matmul_kernel(
    A,
    B,
    row_stats,
    col_stats,
    bias,
    X,
    outlier_mask,
    out,
    M,
    N,
    K,
    INT8_DOT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """A tile of A @ B^T in i32 or, given row_stats, of what it stands for in out's dtype.

    Given X, it adds X @ dequantized(B)^T over the columns that outlier_mask names.
    """
    m, n = tile_of_program(N, TILE_M, TILE_N)
    products = tl.zeros([TILE_M, TILE_N], tl.int32)
    outliers = tl.zeros([TILE_M, TILE_N], tl.float32)
    for first in range(0, K, TILE_K):
        k = first + tl.arange(0, TILE_K)
        inside_a = (m < M)[:, None] & (k < K)[None, :]
        a = tl.load(A + m[:, None] * K + k[None, :], mask=inside_a, other=0)
        b = tl.load(B + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        products = add_products(a, b, products, INT8_DOT)
        if X is not None:
            chosen = tl.load(outlier_mask + k, mask=k < K, other=0)
            if tl.max(chosen.to(tl.int32), axis=0) != 0:
                x = tl.load(X + m[:, None] * K + k[None, :], mask=inside_a & (chosen != 0)[None, :], other=0.0)
                weight = (b.to(tl.float32) * CODE_SCALE).to(x.dtype)
                outliers = tl.dot(x, tl.trans(weight), outliers, input_precision="ieee")
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m[:, None] * N + n[None, :]
    if row_stats is None:
        tl.store(out + place, products, mask=inside)
    else:
        result = scaled_products(products, m, n, M, N, row_stats, col_stats, bias)
        if X is not None:
            columns = tl.load(col_stats + n, mask=n < N, other=0.0)
            result += outliers * tl.div_rn(columns, 127.0 * CODE_SCALE)[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor
) -> None:
    M, N = row_stats.numel(), col_stats.numel()
    programs = tiles(M, N, 16, 128)
    launch(int8_mm_dequant_kernel, programs, A, row_stats, col_stats, bias, out, M, N, TILE_M=16, TILE_N=128)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor) -> None:
    _matmul(A, B, (None, None, None), (None, None), out)


def int8_scaled_mm(A: Int8Rows, B: Int8Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor) -> None:
    _matmul(A.codes, B.codes, (A.row_stats, B.col_stats, bias), (None, None), out)


def int8_mixed_scaled_mm(
    A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    scales = CA.row_stats, CB.col_stats, bias
    _matmul(CA.codes, CB.codes, scales, (A, outlier_mask.view(torch.uint8)), out)


def int8_linear_backward(dY: Tensor, B: Int8Weight, out: Tensor) -> Dense:
    return dense_for(dY.dtype, terms=B.codes.shape[0])


def _matmul(
    A: Tensor, B: Tensor, scales: tuple[Tensor | None, ...], outliers: tuple[Tensor | None, ...], out: Tensor
) -> None:
    """``scales`` and ``outliers`` are the kernel's: row_stats, col_stats and bias; X and outlier_mask."""
    N, K = B.shape
    M = math.prod(A.shape[:-1])
    int8_dot = has_int8_dot(A.device)
    shape_of_tile = tile(M, int8_dot, outliers[0] is not None)
    launch(
        int8_matmul_kernel,
        tiles(M, N, shape_of_tile["TILE_M"], shape_of_tile["TILE_N"]),
        *(A, B, *scales, *outliers, out, M, N, K),
        INT8_DOT=int8_dot,
        **shape_of_tile,
    )


def tile(M: int, int8_dot: bool, outliers: bool) -> dict[str, int]:
    """The tile of one program for so many rows: as large as no GPU's registers overflow."""
    if outliers or not int8_dot:
        return {"TILE_M": SMALLEST_DOT, "TILE_N": 32, "TILE_K": 32}
    if M <= SMALLEST_DOT:
        return {"TILE_M": SMALLEST_DOT, "TILE_N": 32, "TILE_K": 128}
    return {"TILE_M": 64, "TILE_N": 64, "TILE_K": 32}


@cache
def has_int8_dot(device: torch.device) -> bool:
    """Whether Triton compiles an exact dot of codes there.

    For NVIDIA's GPUs before Ampere it compiles none, and for those of Intel without matrix units (XMX) none that is
    known to be exact.
    """
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return getattr(properties, "has_subgroup_matrix_multiply_accumulate", False)
    return device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) >= (8, 0)
