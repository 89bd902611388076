"""Codebooks inside a kernel: a block's scale, the nearest code, the value of a code (docs/SPEC.md section 2).

Codebooks of 16 and midpoints are looked up by tl.gather. Intel's Triton 3.7 compiled one whose result was used twice to
zeros on an Arc B580 (issue 6511 of intel-xpu-backend-for-triton, open); of ours that is so in gemm_4bit's f16 products.
The conformance suite, run on the GPU, shows whether a version does so.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from bnb_core.formats import FORMATS, Encoder

SIGN = tl.constexpr(8)
"""The bit of a code that is its sign, in a format that has one; the three below are its magnitude's."""

MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
SMALLEST_NORMAL_BITS = tl.constexpr(0x00800000)
INFINITY_BITS = tl.constexpr(0x7F800000)


def _ascending(codebook: tuple[float, ...], encoder: Encoder) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Of the values that the encoder looks up, from low to high: the midpoints between neighbours, and the codes.

    Midpoints are in f32; a last one, that nothing exceeds, makes the count a power of two.
    """
    values = np.array(codebook[: 8 if encoder is Encoder.SIGN_MAGNITUDE else 16], dtype=np.float32)
    codes = values.argsort()
    ascending = values[codes]
    midpoints = (ascending[:-1] + ascending[1:]) * np.float32(0.5)
    return (*midpoints.tolist(), float("inf")), tuple(codes.tolist())


_LOOKUPS = {each.name: _ascending(each.codebook, each.encoder) for each in FORMATS.values()}

CODEBOOKS = tl.constexpr({each.name: each.codebook for each in FORMATS.values()})
HAS_SIGN = tl.constexpr({each.name: each.encoder is Encoder.SIGN_MAGNITUDE for each in FORMATS.values()})
MIDPOINTS = tl.constexpr({name: midpoints for name, (midpoints, _) in _LOOKUPS.items()})
ASCENDING_CODES = tl.constexpr({name: codes for name, (_, codes) in _LOOKUPS.items()})
"""These four by the name of the format, a constant of the kernels; MIDPOINTS and codes for the encoder."""


@triton.constexpr_function
def of_format(tables, quant_type):
    """Its entry; in a kernel Triton takes no name as an index."""
    return tables[quant_type]


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
    return constant_table(of_format(CODEBOOKS, QUANT_TYPE), 16)


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
    if of_format(HAS_SIGN, QUANT_TYPE):
        rank = count_below(constant_table(of_format(MIDPOINTS, QUANT_TYPE), 8), tl.abs(scaled), 3)
        magnitude = tl.gather(constant_table(of_format(ASCENDING_CODES, QUANT_TYPE), 8), rank, 0).to(tl.int32)
        return magnitude + tl.where(scaled < 0, SIGN, 0)
    else:
        return count_below(constant_table(of_format(MIDPOINTS, QUANT_TYPE), 16), scaled, 4)


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
