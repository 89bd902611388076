"""The simulator's numeric intrinsics give a device's bits: against numpy and torch, over all 16-bit patterns, ties,
subnormals, overflow and NaN."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from simulator.build import COMPILERS, HERE, build

pytestmark = pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler: g++ or clang++")

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
RANDOM = np.random.default_rng(0)
NAN_BITS = 0x7FFF
"""The one NaN that devices convert to."""


@pytest.fixture(scope="module", params=COMPILERS)
def numbers(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("numbers") / "numbers.so"
    build(path, [HERE / "numbers.cu"], request.param, link_flags=["-shared"])
    library = ctypes.CDLL(str(path))

    def call(name, *inputs, dtype):
        arrays = [np.ascontiguousarray(values) for values in inputs]
        out = np.empty(arrays[0].shape, dtype)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*arrays, out)]
        getattr(library, name)(*pointers, out.size)
        return out

    return call


def _floats_around(values: np.ndarray) -> np.ndarray:
    """Floats at, beside and half way between neighbouring values of a narrower type, and floats at random."""
    values = values[np.isfinite(values)]
    values = np.unique(values).astype(np.float64)
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    exact = values.astype(np.float32)
    near = np.concatenate([ties, exact])
    infinity = np.float32(np.inf)
    random = RANDOM.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519.996, 65520.0, -65520.0, 3.4e38, 1e-45], np.float32)
    return np.concatenate([near, np.nextafter(near, infinity), np.nextafter(near, -infinity), random, special])


def _with_one_nan(bits: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.uint16(NAN_BITS), bits)


def _bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_every_half_has_its_value(numbers):
    got = numbers("half_to_float", PATTERNS, dtype=np.float32)
    np.testing.assert_array_equal(got, PATTERNS.view(np.float16).astype(np.float32))


def test_every_bfloat16_has_its_value(numbers):
    got = numbers("bfloat16_to_float", PATTERNS, dtype=np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), _bfloat16(PATTERNS).view(np.uint32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floats_round_to_the_nearest_half(numbers):
    x = _floats_around(PATTERNS.view(np.float16).astype(np.float32))
    got = numbers("float_to_half", x, dtype=np.uint16)
    np.testing.assert_array_equal(got, _with_one_nan(x.astype(np.float16).view(np.uint16), x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_doubles_round_once_to_the_nearest_half(numbers):
    """Also those that would be a tie after a first rounding to float."""
    x = _floats_around(PATTERNS.view(np.float16).astype(np.float32)).astype(np.float64)
    x = x[np.isfinite(x)]
    x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])
    got = numbers("double_to_half", x, dtype=np.uint16)
    np.testing.assert_array_equal(got, x.astype(np.float16).view(np.uint16))


def test_floats_round_to_the_nearest_bfloat16(numbers):
    x = _floats_around(_bfloat16(PATTERNS))
    got = numbers("float_to_bfloat16", x, dtype=np.uint16)
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, _with_one_nan(expected, x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "operation"), [("half_product", np.multiply), ("half_sum", np.add)])
def test_arithmetic_of_halves_is_rounded_once(numbers, name, operation):
    x, y = RANDOM.permutation(PATTERNS), RANDOM.permutation(PATTERNS)
    expected = operation(x.view(np.float16).astype(np.float64), y.view(np.float16).astype(np.float64))
    got = numbers(name, x, y, dtype=np.uint16)
    np.testing.assert_array_equal(got, _with_one_nan(expected.astype(np.float16).view(np.uint16), expected))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "rounded", "dtype"),
    [
        ("float_to_int", np.rint, np.int32),
        ("float_to_int_down", np.floor, np.int32),
        ("float_to_unsigned", np.trunc, np.uint32),
    ],
)
def test_integers_are_rounded_and_saturated(numbers, name, rounded, dtype):
    halves = np.arange(-1000, 1000, dtype=np.float32) / 2
    special = np.array([np.nan, np.inf, -np.inf, 2147483520, 2147483648, -2147483648, 4294967296, 1e20], np.float32)
    random = RANDOM.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, special, random])
    limits = np.iinfo(dtype)
    expected = np.clip(np.nan_to_num(rounded(x).astype(np.float64), nan=0.0), limits.min, limits.max).astype(dtype)
    np.testing.assert_array_equal(numbers(name, x, dtype=dtype), expected)


def _words(count: int) -> np.ndarray:
    return RANDOM.integers(0, 1 << 32, count, dtype=np.uint32)


def test_dot_products_of_bytes(numbers):
    x, y = _words(10000), _words(10000)
    products = x.view(np.int8).astype(np.int64) * y.view(np.int8)
    expected = products.reshape(-1, 4).sum(1) + np.arange(10000)
    np.testing.assert_array_equal(numbers("dot_of_bytes", x, y, dtype=np.int32), expected)


def test_permuted_bytes(numbers):
    """Over every selector; the top bit of a nibble asks for the sign of its byte."""
    x, y = _words(1 << 16), _words(1 << 16)
    pool = np.concatenate([x.view(np.uint8).reshape(-1, 4), y.view(np.uint8).reshape(-1, 4)], axis=1)
    nibbles = np.arange(1 << 16)[:, None] >> np.array([0, 4, 8, 12]) & 15
    picked = np.take_along_axis(pool, nibbles & 7, axis=1)
    signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
    expected = np.ascontiguousarray(np.where(nibbles & 8, signs, picked)).view(np.uint32).ravel()
    np.testing.assert_array_equal(numbers("permuted_bytes", x, y, dtype=np.uint32), expected)


def test_bits(numbers):
    x = np.concatenate([_words(1000), np.array([0, 1, 0x80000000], np.uint32)])
    text = [f"{value:032b}" for value in x]
    reversed_bits = [int(bits[::-1], 2) for bits in text]
    leading_zeros = [32 - len(bits.lstrip("0")) for bits in text]
    np.testing.assert_array_equal(numbers("reversed_bits", x, dtype=np.uint32), reversed_bits)
    np.testing.assert_array_equal(numbers("leading_zeros", x, dtype=np.uint32), leading_zeros)
