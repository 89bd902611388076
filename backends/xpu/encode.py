"""Codebooks inside a kernel: a block's scale, the nearest code, the value of a code (docs/SPEC.md section 2).

Codebooks of 16 and midpoints are looked up by tl.gather. Intel's Triton 3.7 compiled one whose result was used twice to
zeros on an Arc B580 (issue 6511 of intel-xpu-backend-for-triton, open); of ours that is so in gemm_4bit's f16 products.
The conformance suite, run on the GPU, shows whether a version does so.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from bnb_core.codebooks import FOUR_BIT_CODES

FP4_SIGN = tl.constexpr(8)
"""The bit of an fp4 code that is its sign; the three below are the index of its magnitude."""

MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
SMALLEST_NORMAL_BITS = tl.constexpr(0x00800000)
INFINITY_BITS = tl.constexpr(0x7F800000)


def _midpoints(ascending: np.ndarray) -> tuple[float, ...]:
    """Between neighbours, in f32; a last one, that nothing exceeds, makes the count a power of two."""
    return (*((ascending[:-1] + ascending[1:]) * np.float32(0.5)).tolist(), float("inf"))


NF4_VALUES = tl.constexpr(FOUR_BIT_CODES["nf4"])
FP4_VALUES = tl.constexpr(FOUR_BIT_CODES["fp4"])
NF4_MIDPOINTS = tl.constexpr(_midpoints(np.array(FOUR_BIT_CODES["nf4"], dtype=np.float32)))
FP4_MIDPOINTS = tl.constexpr(_midpoints(np.sort(np.array(FOUR_BIT_CODES["fp4"][:8], dtype=np.float32))))


@triton.jit
def constant_table(VALUES: tl.constexpr, SIZE: tl.constexpr):
    """f32[SIZE] of constants."""
    index = tl.arange(0, SIZE)
    table = tl.zeros([SIZE], tl.float32)
    for i in tl.static_range(SIZE):
        table = tl.where(index == i, VALUES[i], table)
    return table


@triton.jit
def values_4bit(QUANT_TYPE: tl.constexpr):
    """f32[16]: the value of each code."""
    if QUANT_TYPE == "nf4":
        return constant_table(NF4_VALUES, 16)
    else:
        return constant_table(FP4_VALUES, 16)


@triton.jit
def midpoints_of(code_ptr):
    """f32[256] from an ascending codebook f32[256]; the last one, that nothing exceeds, fills up."""
    index = tl.arange(0, 256)
    between = (tl.load(code_ptr + index) + tl.load(code_ptr + tl.minimum(index + 1, 255))) * 0.5
    return tl.where(index < 255, between, float("inf"))


@triton.jit
def count_below(midpoints, values, BITS: tl.constexpr):
    """For each of the values [n], how many of the first 2^BITS - 1 ascending midpoints are less: the nearest code.

    A tie goes to the lower one.
    """
    count = tl.zeros_like(values).to(tl.int32)
    for bit in tl.static_range(BITS - 1, -1, -1):
        higher = count + (1 << bit)
        count = tl.where(tl.gather(midpoints, higher - 1, 0) < values, higher, count)
    return count


@triton.jit
def codes_4bit(scaled, QUANT_TYPE: tl.constexpr):
    """The codes i32[n] nearest to values f32[n] of [-1, 1]."""
    if QUANT_TYPE == "nf4":
        return count_below(constant_table(NF4_MIDPOINTS, 16), scaled, 4)
    else:
        rank = count_below(constant_table(FP4_MIDPOINTS, 8), tl.abs(scaled), 3)
        # In ascending order the magnitudes have the indices 0 1 6 7 4 5 2 3.
        magnitude = rank ^ ((rank & 2) << 1)
        return tl.where(scaled < 0, magnitude + FP4_SIGN, magnitude)


@triton.jit
def scaled_blocks(values):
    """Scale f32[blocks, blocksize] to [-1, 1].

    Returns the scaled values, zeros in blocks without a usable scale, and the absmax f32[blocks] to store: 0 for a zero
    or subnormal block, NaN for one that holds a NaN, else infinity for one that holds one.
    """
    # As integers, magnitudes are ordered with NaN above infinity.
    bits = tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=1)
    bits = tl.where(bits < SMALLEST_NORMAL_BITS, 0, bits)
    absmax = bits.to(tl.float32, bitcast=True)
    usable = is_usable(absmax)
    reciprocal = tl.div_rn(1.0, tl.where(usable, absmax, 1.0))
    return tl.where(usable[:, None], values * reciprocal[:, None], 0.0), absmax


@triton.jit
def is_usable(absmax):
    """Whether values can be divided by it: it is positive and finite."""
    bits = absmax.to(tl.int32, bitcast=True)
    return (bits > 0) & (bits < INFINITY_BITS)
